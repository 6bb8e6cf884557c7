// How fast do cores multiply at all? Independent multiply-adds in registers: the rate that no kernel can beat.
#pragma once

#include <cstdint>

#include "params.h"

namespace vpns {

struct MultiplyLoop {
  double operations;  // of a round; a multiply-add is two
  void (*run)(int64_t rounds);
};

MultiplyLoop run_multiply_loop_avx2();
MultiplyLoop run_multiply_loop_avx512();
MultiplyLoop run_multiply_loop_avx512_bf16();
MultiplyLoop run_multiply_loop_amx();

// Billions of operations a second of so many threads together, by the fastest instructions usable here that multiply
// numbers of this type (float32 or bfloat16) into float32; 0 where there are none.
double multiply_rate(DType dtype, int threads);

}  // namespace vpns
