// The input gradient as what it is: the same sparse convolution, of the output's gradient with the transposed weight.
//
// dx[h, c] = Σ over taps r with stride | h + pad - r · dilation of dy[(h + pad - r · dilation) / stride, k] · w[k, c, r]
// (columns alike). Input rows of one remainder modulo the stride share their taps, and for them it is a convolution of
// stride 1 over dy; so the gradient is stride_h · stride_w forward convolutions, each written to every stride-th row and
// column, by whichever forward kernel this machine prefers.
#include <algorithm>
#include <memory>
#include <numeric>

#include "cpu/input_gradient.h"

namespace vpns {
namespace {

AxisClass axis_class(int64_t remainder, int64_t input, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  AxisClass axis{remainder, remainder < input ? (input - remainder + stride - 1) / stride : 0, 0, 1, {}};
  // Forward taps in falling order read dy in rising order.
  for (int64_t r = taps - 1; r >= 0; --r)
    if ((remainder + pad - r * dilation) % stride == 0) axis.tap.push_back(r);
  if (axis.tap.empty()) return axis;
  axis.pad = -(remainder + pad - axis.tap[0] * dilation) / stride;
  if (axis.tap.size() > 1) axis.dilation = (axis.tap[0] - axis.tap[1]) * dilation / stride;
  return axis;
}

int64_t element_bytes(DType dtype) {
  return dtype == DType::kF64 ? 8 : dtype == DType::kF32 ? 4 : 2;
}

struct Entry {
  int32_t row, column, from;
};

// Entries of the class, as (row of the transposed weight, its flat index, entry of the forward weight), in order.
std::vector<Entry> class_entries(const ConvShape& s, const SparseWeights& w, const AxisClass& h, const AxisClass& v) {
  const int64_t taps = s.R * s.S, own_taps = static_cast<int64_t>(h.tap.size() * v.tap.size());
  const int64_t filters = s.K / s.groups, channels = s.C / s.groups;
  const int64_t rows_per_group = (filters + w.bk - 1) / w.bk, columns_per_group = (channels + w.bc - 1) / w.bc;
  std::vector<int32_t> own_tap(taps, -1);
  for (size_t i = 0; i < h.tap.size(); ++i)
    for (size_t j = 0; j < v.tap.size(); ++j)
      own_tap[h.tap[i] * s.S + v.tap[j]] = static_cast<int32_t>(i * v.tap.size() + j);
  std::vector<Entry> entries;
  for (int64_t row = 0; row < s.groups * rows_per_group; ++row)
    for (int32_t i = w.indptr[row]; i < w.indptr[row + 1]; ++i) {
      const int32_t tap = own_tap[w.index[i] % taps];
      if (tap < 0) continue;
      const int64_t channel = w.index[i] / taps, group = row / rows_per_group;
      entries.push_back({static_cast<int32_t>(group * columns_per_group + channel),
                         static_cast<int32_t>(row % rows_per_group * own_taps + tap), i});
    }
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.row != b.row ? a.row < b.row : a.column < b.column; });
  return entries;
}

// Channel weights: the lists change places, and the class's taps are picked in their order.
OwnedWeights transpose_channels(const ConvShape& s, const SparseWeights& w, const AxisClass& h, const AxisClass& v) {
  const int64_t bytes = element_bytes(w.dtype), taps = s.R * s.S;
  OwnedWeights t;
  t.indptr.assign(w.index, w.index + w.columns);
  t.index.assign(w.indptr, w.indptr + w.count);
  const char* from = static_cast<const char*>(w.values);
  const bool has_taps = !h.tap.empty() && !v.tap.empty();
  t.values = std::make_unique<char[]>(w.columns * w.count * (has_taps ? h.tap.size() * v.tap.size() : 1) * bytes);
  char* to = t.values.get();
  for (int64_t c = 0; c < w.columns && has_taps; ++c)
    for (int64_t k = 0; k < w.count; ++k)
      for (int64_t r : h.tap)
        for (int64_t col : v.tap)
          to = std::copy_n(from + ((k * w.columns + c) * taps + r * s.S + col) * bytes, bytes, to);
  t.view = {w.format, w.dtype, t.values.get(), t.indptr.data(), t.index.data(), w.columns, 1, 1, w.count};
  return t;
}

OwnedWeights transpose(const ConvShape& s, const SparseWeights& w, const AxisClass& h, const AxisClass& v) {
  if (w.format == Format::kChannel) return transpose_channels(s, w, h, v);
  const int64_t channels = s.C / s.groups, rows = s.groups * ((channels + w.bc - 1) / w.bc);
  const int64_t bytes = element_bytes(w.dtype);
  const std::vector<Entry> entries = class_entries(s, w, h, v);
  OwnedWeights t;
  t.indptr.assign(rows + 1, 0);
  t.index.reserve(entries.size());
  t.values = std::make_unique<char[]>(entries.size() * w.bk * w.bc * bytes);
  const char* from = static_cast<const char*>(w.values);
  char* to = t.values.get();
  for (const Entry& entry : entries) {
    ++t.indptr[entry.row + 1];
    t.index.push_back(entry.column);
    for (int64_t c = 0; c < w.bc; ++c)
      for (int64_t k = 0; k < w.bk; ++k, to += bytes)
        std::copy_n(from + ((entry.from * w.bk + k) * w.bc + c) * bytes, bytes, to);
  }
  std::partial_sum(t.indptr.begin(), t.indptr.end(), t.indptr.begin());
  t.view = {w.format, w.dtype, t.values.get(), t.indptr.data(), t.index.data(), static_cast<int64_t>(entries.size()),
            w.bc,     w.bk};
  return t;
}

class PreparedInputGradient final : public PreparedConv {
 public:
  PreparedInputGradient(const ConvShape& s, const TransposeClass& transpose_class, DType grad_dtype,
                        const std::string& kernel)
      : shape_(s) {
    for (int64_t a = 0; a < std::min(s.stride_h, s.H); ++a)
      for (int64_t b = 0; b < std::min(s.stride_w, s.W); ++b) {
        AxisClass h = axis_class(a, s.H, s.R, s.stride_h, s.pad_h, s.dilation_h);
        AxisClass v = axis_class(b, s.W, s.S, s.stride_w, s.pad_w, s.dilation_w);
        // No tap reaches these inputs: a 1×1 layer that keeps nothing.
        if (h.tap.empty() || v.tap.empty()) {
          h.tap.clear();
          v.tap.clear();
        }
        const OwnedWeights t = transpose_class(h, v);
        const int64_t R = std::max<int64_t>(h.tap.size(), 1), S = std::max<int64_t>(v.tap.size(), 1);
        const ConvShape own{s.N, s.K,      s.P, s.Q,   s.C,   R,          S,          h.extent, v.extent,
                            1,   1,        h.pad, v.pad, h.dilation, v.dilation, s.groups};
        parts_.push_back({a, b, choose_sparse_conv2d(kernel, own, t.view, grad_dtype).prepare(own, t.view)});
      }
  }

  // call.x is dy [N, P, Q, K], call.y is dx [N, H, W, C].
  void run(const ConvCall& call) const override {
    const int64_t row = shape_.W * shape_.C;
    for (const Part& part : parts_) {
      ConvCall own = call;
      own.y_stride_n = shape_.H * row;
      own.y_stride_h = shape_.stride_h * row;
      own.y_stride_w = shape_.stride_w * shape_.C;
      own.y = static_cast<char*>(call.y) + (part.row * row + part.column * shape_.C) * element_bytes(call.y_dtype);
      part.conv->run(own);
    }
  }

 private:
  struct Part {
    int64_t row, column;
    std::unique_ptr<PreparedConv> conv;
  };
  ConvShape shape_;
  std::vector<Part> parts_;
};

}  // namespace

std::unique_ptr<PreparedConv> prepare_input_gradient(const ConvShape& shape, const TransposeClass& transpose_class,
                                                     DType grad_dtype, const std::string& kernel) {
  return std::make_unique<PreparedInputGradient>(shape, transpose_class, grad_dtype, kernel);
}

std::unique_ptr<PreparedConv> prepare_input_gradient(const ConvShape& shape, const SparseWeights& weights,
                                                     DType grad_dtype, const std::string& kernel) {
  const auto transpose_class = [&](const AxisClass& h, const AxisClass& w) { return transpose(shape, weights, h, w); };
  return prepare_input_gradient(shape, transpose_class, grad_dtype, kernel);
}

}  // namespace vpns
