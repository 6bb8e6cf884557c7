// Depthwise convolution: each channel by a filter of its own, on vectors of channels.
//
// For a vector of channels and a few neighbouring output pixels the sums stay in registers while the taps go by: what
// is read of a pixel is one vector, and rows of inputs are shared by the windows that overlap. Weights that were pruned
// are left out lane by lane, so that what they would have read does not matter. Where none was, square filters of the
// usual sizes go over tiles of two rows and four columns, each input of which is loaded and widened once.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "params.h"

namespace vpns {

struct DepthwisePlan {
  ConvShape shape;
  int64_t vectors;             // of 16 channels, the last filled up
  std::vector<float> weights;  // [taps][vectors][16]
  std::vector<int32_t> kept;   // [taps][vectors][16]: -1 where a weight is kept, else 0
  // [taps][vectors]: how many of the vector's channels keep the tap: none, some or all of those that exist
  enum class Kept : uint8_t { kNone, kSome, kAll };
  std::vector<Kept> kinds;
  bool is_dense;  // no weight was pruned
};

void run_depthwise_avx2(const DepthwisePlan&, const ConvCall&);
void run_depthwise_avx512(const DepthwisePlan&, const ConvCall&);
// The same, with the instructions that round to bfloat16.
void run_depthwise_avx512_bf16(const DepthwisePlan&, const ConvCall&);

}  // namespace vpns
