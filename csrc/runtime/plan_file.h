// The bytes of a plan.bin in memory, where a network can read them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace vpns {

class PlanFile {
 public:
  // Reads all of it; std::runtime_error where it cannot be read.
  explicit PlanFile(const std::string& path);

  const uint8_t* data() const { return bytes_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* bytes) const;
  };
  // Aligned to 64 bytes, as the tensors in it are from its start on.
  std::unique_ptr<uint8_t, Free> bytes_;
  int64_t size_ = 0;
};

}  // namespace vpns
