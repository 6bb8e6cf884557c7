// The gradient of kept unstructured weights only: for each the product of two laid-out rows, so as many operations as
// the sparse forward.
//
// d values[i] = Σ over output pixels of dy[pixel, k] · x[pixel's tap, c] for the kept (k, c, r, s). Lanes, planes,
// tiles, segments and chunks are those of the forward (sparse_conv2d_unstructured.h), with dy laid out beside the
// planes. For a segment and an output channel its vectors of dy stay in registers while the channel's kept weights
// stream past, four at a time: each weight is an offset, and per vector one multiply-add with a memory operand. The
// lanes of 16 sums are then added up together.
//
// Tiles are shared out into pieces, as many whatever the number of threads; each has sums of its own, which one thread
// adds up tile by tile, and the pieces' sums join in order. So the result does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu/sparse_conv2d_unstructured.h"
#include "cpu/weight_gradient.h"

namespace vpns {

struct UnstructuredGradPart {
  UnstructuredPart part;
  int64_t tiles, pieces;
  int64_t filter_stride;  // floats between two output channels of a tile's dy
};

// Writes (is_first) or adds to call.out [count], in the packed order.
using RunUnstructuredGrad = void (*)(const UnstructuredGradPart&, const WeightGradCall&, bool is_first);
void run_unstructured_grad_avx2(const UnstructuredGradPart&, const WeightGradCall&, bool is_first);
void run_unstructured_grad_avx512(const UnstructuredGradPart&, const WeightGradCall&, bool is_first);
void run_unstructured_grad_avx512_emulated(const UnstructuredGradPart&, const WeightGradCall&, bool is_first);

// For the layout of unstructured weights, whose values are not read; by the kernel of that name, or for an empty one
// the first that runs here.
std::unique_ptr<PreparedWeightGrad> prepare_unstructured_gradient(const ConvShape&, const SparseWeights& layout,
                                                                  const std::string& name);

// Names of the kernels that run here, preferred first.
std::vector<std::string> unstructured_gradient_kernels(bool emulated);

// Registers that hold dy; the others hold the sums of kGradEntries weights.
constexpr int kMaxGradSegmentAvx2 = 12;
constexpr int kMaxGradSegmentAvx512 = 28;
constexpr int kGradEntries = 4;

}  // namespace vpns
