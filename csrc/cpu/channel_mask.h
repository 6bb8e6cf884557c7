// Channels of an activation times their mask, and what their scores get: Σ x · dy over the pixels, masked or not.
//
// Activations are [pixels, channels], channels side by side (channels_last). Each direction reads and writes once. Sums
// are taken in chunks of pixels that depend on the sizes alone, then over the chunks in double precision, so the result
// does not depend on the number of threads.
#pragma once

#include <cstdint>

#include "params.h"

namespace vpns {

struct ChannelMaskForward {
  DType dtype;  // of x and y
  const void* x;
  void* y;
  int64_t pixels, channels;
  const float* mask;  // 1 or 0
  int threads;
};

struct ChannelMaskBackward {
  DType dtype;  // of grad, x and grad_x
  const void* grad;
  const void* x;
  void* grad_x;  // may be null
  int64_t pixels, channels;
  const float* mask;
  float* sums;  // [channels]; may be null
  int threads;
};

// Both throw std::invalid_argument where the CPU lacks AVX2.
void channel_mask(const ChannelMaskForward& call);
void channel_mask_backward(const ChannelMaskBackward& call);

void run_channel_mask_avx2(const ChannelMaskForward& call);
void run_channel_mask_avx512(const ChannelMaskForward& call);
void run_channel_mask_backward_avx2(const ChannelMaskBackward& call);
void run_channel_mask_backward_avx512(const ChannelMaskBackward& call);

}  // namespace vpns
