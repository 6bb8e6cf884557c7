// Working memory of the calling thread: grown when needed, kept until the thread ends, 64-byte aligned.
#pragma once

#include <cstdint>

namespace vpns {

float* thread_scratch(int64_t floats);

}  // namespace vpns
