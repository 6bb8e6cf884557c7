// The plain structures that travel between the bindings, the dispatch table and the kernels.
//
// Letters: images N, input channels C, input height and width H W, output channels K, filter height and width R S,
// output height and width P Q. Strides and offsets count elements, never bytes.
#pragma once

#include <cstdint>

namespace vpns {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF64 = 2 };

// How kept weights lie in memory (vpns_kernels/formats).
enum class Format : int32_t { kUnstructured = 0, kBlock = 1 };

struct ConvShape {
  int64_t N, C, H, W, K, R, S, P, Q;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

// Kept weights in their portable order: row k (or block row) holds index[indptr[k]] ... index[indptr[k + 1] - 1],
// each a flat (c, r, s) (or (block of c, r, s)) inside the group of k.
struct SparseWeights {
  Format format;
  DType dtype;
  const void* values;  // [count] or [count, bk, bc]
  const int32_t* indptr;
  const int32_t* index;
  int64_t count;
  int64_t bk, bc;  // 1, 1 where unstructured
};

// One call: x [N, H, W, C] with contiguous channels and free other strides, y [N, P, Q, K] dense.
struct ConvCall {
  const void* x;
  DType x_dtype;
  int64_t x_stride_n, x_stride_h, x_stride_w;
  void* y;
  DType y_dtype;
  const void* bias;  // [K] in float, or in double where x is double; may be null
  int threads;
};

}  // namespace vpns
