// The input gradient as forward convolutions: one for each remainder of input rows and columns modulo the stride.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "params.h"

namespace vpns {

// One axis of one remainder class: which taps it uses and the stride-1 convolution that they form.
struct AxisClass {
  int64_t first;             // input row of the class's first output
  int64_t extent;            // how many rows it has
  int64_t pad, dilation;     // of the convolution over dy; pad may be negative
  std::vector<int64_t> tap;  // by its own tap, the forward tap
};

class TransposedWeights;

// Weights that are nobody else's. With a layout their indices are there, and it can be filled with other values.
struct OwnedWeights {
  std::unique_ptr<char[]> values;
  std::vector<int32_t> indptr, index;
  SparseWeights view{};
  std::shared_ptr<const TransposedWeights> layout;
};

// The transposed weight of one class: rows are input channels (block: blocks of them), taps are the class's.
using TransposeClass = std::function<OwnedWeights(const AxisClass& h, const AxisClass& w)>;

std::unique_ptr<PreparedConv> prepare_input_gradient(const ConvShape&, const TransposeClass&, DType grad_dtype,
                                                     const std::string& kernel);

}  // namespace vpns
