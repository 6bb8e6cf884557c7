#include "cpu/scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "arithmetic.h"

namespace vpns {
namespace {

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

float* thread_scratch(int64_t floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (floats > capacity) {
    const int64_t rounded = round_up(floats, 1024);
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<float*>(std::aligned_alloc(4096, rounded * sizeof(float))));
    if (!memory) throw std::bad_alloc();
    capacity = rounded;
  }
  return memory.get();
}

}  // namespace vpns
