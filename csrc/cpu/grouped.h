// Convolution by narrow groups, of 4 or 8 channels that make as many, with all weights kept: ResNeXt's and RegNet's.
//
// A vector of outputs holds whole groups, and what they read is one vector of inputs, permuted: channel by channel in
// float32, pair by pair in bfloat16. Outputs are made by tiles (channel_tiles.inl), the input is read where it is.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "params.h"

namespace vpns {

struct GroupedPlan {
  ConvShape shape;
  std::vector<float> weights;  // [taps][channels of a group][K]; in bfloat16 [taps][pairs of a group][K] words
};

void run_grouped_avx2(const GroupedPlan&, const ConvCall&);
void run_grouped_avx512(const GroupedPlan&, const ConvCall&);
void run_grouped_avx512_bf16(const GroupedPlan&, const ConvCall&);

}  // namespace vpns
