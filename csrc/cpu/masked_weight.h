// Kept weights of a dense weight whose mask changes at every step, packed in the portable order.
//
// The mask has one byte per unit: a weight, or a block of bk output channels × bc input channels of one tap. Values are
// rounded to the type that the convolution's input has. For the input gradient (a forward convolution of the output's
// gradient, whose rows are input channels) blocks are read straight from the dense weight as well; single weights are
// packed first and then sorted anew. Weights of taps that see padding alone are left out.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/input_gradient.h"
#include "cpu/kernels.h"
#include "params.h"

namespace vpns {

struct MaskedWeight {
  const float* weight;  // [K, C / groups, R, S], by strides; taps (r · S + s) have one stride
  int64_t stride_k, stride_c, stride_tap;
  const uint8_t* mask;  // [rows, columns, R, S] of units, rows counted over all groups
  int64_t bk, bc;       // 1, 1: single weights
};

// Refuses sizes with which packing would read outside of weight or mask.
void check_masked_weight(const ConvShape&, const MaskedWeight&);

// `dtype` is that of the input: what values are rounded to.
OwnedWeights pack_masked(const ConvShape&, const MaskedWeight&, DType dtype, int threads);

std::unique_ptr<PreparedConv> prepare_masked(const ConvShape&, const MaskedWeight&, DType x_dtype,
                                             const std::string& kernel, int threads);
std::unique_ptr<PreparedConv> prepare_masked_input_gradient(const ConvShape&, const MaskedWeight&, DType grad_dtype,
                                                            const std::string& kernel, int threads);

}  // namespace vpns
