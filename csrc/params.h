// The plain structures that travel between the bindings, the dispatch table and the kernels.
//
// Letters: images N, input channels C, input height and width H W, output channels K, filter height and width R S,
// output height and width P Q. Strides and offsets count elements, never bytes.
#pragma once

#include <cstdint>

namespace vpns {

// Sizes, and entries of a tensor, are below this: places in it are int32.
constexpr int64_t kSizeLimit = int64_t{1} << 31;

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF64 = 2, kF16 = 3 };

constexpr int64_t bytes_of(DType dtype) { return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2; }

// The two half types by their bits, so that no kernel takes one for the other.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// How kept weights lie in memory (vpns_kernels/formats).
enum class Format : int32_t { kUnstructured = 0, kBlock = 1, kChannel = 2 };

// What the outputs pass through last.
enum class Act : int32_t { kNone = 0, kRelu = 1, kRelu6 = 2 };

struct ConvShape {
  int64_t N, C, H, W, K, R, S, P, Q;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

// Kept weights in their portable order. Unstructured and block: row k (or block row) holds index[indptr[k]] ...
// index[indptr[k + 1] - 1], each a flat (c, r, s) (or (block of c, r, s)) inside the group of k. Channel: a smaller
// dense weight of the `count` output channels in indptr and the `columns` input channels in index.
struct SparseWeights {
  Format format;
  DType dtype;
  const void* values;  // [count], [count, bk, bc] or [count, columns, R, S]
  const int32_t* indptr;
  const int32_t* index;
  int64_t count;
  int64_t bk, bc;       // 1, 1 where not block
  int64_t columns = 0;  // of channel weights
  int threads = 1;      // that may prepare them, and are expected to run them
};

// One call: x [N, H, W, C] with contiguous channels and free other strides, y [N, P, Q, K];
// y = act(conv(x) + bias + residual), rounded once.
struct ConvCall {
  const void* x;
  DType x_dtype;
  int64_t x_stride_n, x_stride_h, x_stride_w;
  void* y;
  DType y_dtype;
  const void* bias;  // [K] in float, or in double where x is double; may be null
  int threads;
  const void* residual = nullptr;  // [N, P, Q, K] with y's strides, in y's type; may be null
  Act act = Act::kNone;
  // Where not null: three sums of seconds to which the call adds its own, averaged over its threads: laying out the
  // input, products, finishing and storing the output. Kernels that do not keep count leave them alone.
  double* phases = nullptr;
  // Of y and residual, in elements; all 0 where they are dense.
  int64_t y_stride_n = 0, y_stride_h = 0, y_stride_w = 0;
  // Of a kernel that takes any batch (PreparedConv::takes_any_batch): images of this call; -1: those of the shape.
  int64_t images = -1;
  // Of a kernel that takes any rows (PreparedConv::takes_any_rows): output rows of this call; rows = -1: all. What
  // other rows would read is not touched, nor what they would write.
  int64_t first_row = 0, rows = -1;

  int64_t batch(const ConvShape& s) const { return images < 0 ? s.N : images; }
  int64_t row_count(const ConvShape& s) const { return rows < 0 ? s.P : rows; }

  int64_t y_at(const ConvShape& s, int64_t n, int64_t p, int64_t q) const {
    if (y_stride_w == 0) return ((n * s.P + p) * s.Q + q) * s.K;
    return n * y_stride_n + p * y_stride_h + q * y_stride_w;
  }
};

}  // namespace vpns
