// Training-mode batch norm, residual and activation in one op: y = act((x - mean) · weight / std + bias + residual).
//
// Activations are [pixels, channels], channels side by side (channels_last); statistics are over the pixels. Both
// directions read their inputs twice, once for the sums of each channel and once for the result: the least that batch
// norm allows. Sums are taken in chunks of pixels that depend on the sizes alone, then over the chunks in double
// precision, so the result does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "params.h"

namespace vpns {

struct BatchNormForward {
  DType dtype;  // of x, residual and y
  const void* x;
  const void* residual;  // may be null
  void* y;
  int64_t pixels, channels;
  const float* weight;
  const float* bias;
  float eps;
  float* mean;      // out, [channels]
  float* variance;  // out, biased (divided by pixels)
  Act act;
  int threads;
};

struct BatchNormBackward {
  DType dtype;  // of grad, x, y and both gradients
  const void* grad;
  const void* x;
  const void* y;  // tells where the activation passed; not read where there is none, or where x tells it
  void* grad_x;
  void* grad_residual;  // may be null
  int64_t pixels, channels;
  const float* weight;
  const float* bias;
  const float* mean;
  const float* variance;
  float eps;
  float* grad_weight;
  float* grad_bias;
  Act act;
  int threads;
};

// Both throw std::invalid_argument where the CPU lacks AVX2.
void batch_norm_act(const BatchNormForward& call);
void batch_norm_act_backward(const BatchNormBackward& call);

void run_batch_norm_act_avx2(const BatchNormForward& call);
void run_batch_norm_act_avx512(const BatchNormForward& call);
void run_batch_norm_act_backward_avx2(const BatchNormBackward& call);
void run_batch_norm_act_backward_avx512(const BatchNormBackward& call);

}  // namespace vpns
