// Pooling of channels_last activations: the largest or the mean of each channel over a window, or over equal parts.
#pragma once

#include <cstdint>

#include "params.h"

namespace vpns {

enum class Pool : int { kMax, kMean, kAdaptiveMean };

// x [N, H, W, C] and y [N, P, Q, C], dense, of one type (float32, bf16, fp16). The adaptive mean reads of the shape
// only sizes: output p takes rows [p · H / P, (p + 1) · H / P rounded up), as in torch.
struct PoolCall {
  Pool pool;
  DType dtype;
  const void* x;
  void* y;
  ConvShape shape;       // K = C
  bool counts_padding;   // a mean divides by the whole window, padding included
  int threads;
  int64_t first_row = 0, rows = -1;  // output rows that are wanted, -1: all; nothing is touched for others
};

// Throws std::invalid_argument where the CPU lacks AVX2.
void pool(const PoolCall& call);

void run_pool_avx2(const PoolCall& call);

}  // namespace vpns
