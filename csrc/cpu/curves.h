// What only whole networks need of activations: curves that no kernel takes in, gates, and channels in another order.
#pragma once

#include <cstdint>

#include "params.h"

namespace vpns {

// Bent activations; those of Act pass kernels' own epilogues.
enum class Curve : int32_t { kNone = 0, kSilu, kHardswish, kHardsigmoid, kSigmoid, kGelu, kCount };

// y = curve(y) on `pixels` of `channels` each, `stride` elements apart.
struct CurveCall {
  Curve curve;
  DType dtype;
  void* y;
  int64_t pixels, channels, stride;
  int threads;
};

// y = a * gate on images of `pixels` of `channels` each, all dense and of one type. The gate has one pixel per image,
// as squeeze and excitation have it, or as many as a.
struct GateCall {
  DType dtype;
  const void *a, *gate;
  void* y;
  int64_t images, pixels, channels;
  bool is_per_image;
  int threads;
};

// y[i * groups + g] = x[g * channels / groups + i] of each pixel: what shuffles grouped channels, as torch does.
struct ShuffleCall {
  DType dtype;
  const void* x;
  void* y;
  int64_t pixels, channels, groups;
  int threads;
};

// Throw std::invalid_argument where the CPU lacks AVX2.
void apply_curve(const CurveCall& call);
void apply_gate(const GateCall& call);
void shuffle_channels(const ShuffleCall& call);

void run_curve_avx2(const CurveCall& call);
void run_gate_avx2(const GateCall& call);
void run_shuffle_avx2(const ShuffleCall& call);

}  // namespace vpns
