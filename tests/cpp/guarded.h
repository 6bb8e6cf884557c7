// Memory that tells on whoever leaves it: pages that nobody may touch on both sides, and whatever room is left between
// them and the data holds NaN (of every element type) that must stay.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "arithmetic.h"
#include "params.h"

class Guarded {
 public:
  // The data touches the page after it (at_back) or the page before it.
  Guarded(size_t bytes, bool at_back) : bytes_(bytes), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    room_ = static_cast<size_t>(vpns::round_up(bytes, page_));
    void* all = mmap(nullptr, room_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) std::perror("mmap"), std::exit(2);
    room_begin_ = static_cast<unsigned char*>(all) + page_;
    allow(PROT_READ | PROT_WRITE);
    std::memset(room_begin_, 0xff, room_);
    data_ = at_back ? room_begin_ + room_ - bytes : room_begin_;
  }
  Guarded(Guarded&& other) noexcept { *this = std::move(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    std::swap(bytes_, other.bytes_), std::swap(page_, other.page_), std::swap(room_, other.room_);
    std::swap(room_begin_, other.room_begin_), std::swap(data_, other.data_);
    return *this;
  }
  ~Guarded() {
    if (room_begin_ != nullptr) munmap(room_begin_ - page_, room_ + 2 * page_);
  }

  template <typename T>
  T* as() const { return reinterpret_cast<T*>(data_); }
  size_t bytes() const { return bytes_; }

  // PROT_NONE, PROT_READ or PROT_READ | PROT_WRITE: what may be done with the data from now on.
  void allow(int protection) const {
    if (room_ > 0 && mprotect(room_begin_, room_, protection) != 0) std::perror("mprotect"), std::exit(2);
  }

  bool surroundings_are_intact() const {
    const auto is_filled = [](const unsigned char* from, const unsigned char* to) {
      return std::all_of(from, to, [](unsigned char byte) { return byte == 0xff; });
    };
    return is_filled(room_begin_, data_) && is_filled(data_ + bytes_, room_begin_ + room_);
  }

 private:
  size_t bytes_ = 0, page_ = 0, room_ = 0;
  unsigned char* room_begin_ = nullptr;
  unsigned char* data_ = nullptr;
};

// Guarded memory of one element type, read and written as double; everything is NaN at first.
class GuardedArray {
 public:
  GuardedArray(vpns::DType type, int64_t count, bool at_back)
      : type_(type), count_(count), memory_(static_cast<size_t>(count * vpns::bytes_of(type)), at_back) {}

  vpns::DType type() const { return type_; }
  int64_t count() const { return count_; }
  void* data() const { return memory_.as<void>(); }
  const Guarded& memory() const { return memory_; }

  // Rounds to the element type; gives what is stored.
  double set(int64_t i, double value) const {
    const float single = static_cast<float>(value);
    if (type_ == vpns::DType::kF64) memory_.as<double>()[i] = value;
    else if (type_ == vpns::DType::kF32) memory_.as<float>()[i] = single;
    else if (type_ == vpns::DType::kF16) memory_.as<_Float16>()[i] = static_cast<_Float16>(single);
    else memory_.as<uint16_t>()[i] = to_bf16(single);
    return get(i);
  }

  double get(int64_t i) const {
    if (type_ == vpns::DType::kF64) return memory_.as<double>()[i];
    if (type_ == vpns::DType::kF32) return memory_.as<float>()[i];
    if (type_ == vpns::DType::kF16) return static_cast<double>(memory_.as<_Float16>()[i]);
    const uint32_t bits = static_cast<uint32_t>(memory_.as<uint16_t>()[i]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

 private:
  static uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }

  vpns::DType type_;
  int64_t count_;
  Guarded memory_;
};
