// The input gradient as what it is: the same sparse convolution, of the output's gradient with the transposed weight.
//
// dx[h, c] = Σ over taps r with stride | h + pad - r · dilation
//            of dy[(h + pad - r · dilation) / stride, k] · w[k, c, r]
// and columns alike. Input rows of one remainder modulo the stride share their taps, and for them it is a convolution
// of stride 1 over dy; so the gradient is stride_h · stride_w forward convolutions, each written to every stride-th row
// and column, by whichever forward kernel this machine prefers.
#include <algorithm>
#include <memory>
#include <utility>

#include "arithmetic.h"
#include "cpu/input_gradient.h"
#include "cpu/transposed_weights.h"

namespace vpns {
namespace {

AxisClass axis_class(int64_t remainder, int64_t input, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  AxisClass axis{remainder, remainder < input ? ceil_div(input - remainder, stride) : 0, 0, 1, {}};
  // Forward taps in falling order read dy in rising order.
  for (int64_t r = taps - 1; r >= 0; --r)
    if ((remainder + pad - r * dilation) % stride == 0) axis.tap.push_back(r);
  if (axis.tap.empty()) return axis;
  axis.pad = -(remainder + pad - axis.tap[0] * dilation) / stride;
  if (axis.tap.size() > 1) axis.dilation = (axis.tap[0] - axis.tap[1]) * dilation / stride;
  return axis;
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
        const SparseConvKernel& chosen = choose_sparse_conv2d(kernel, own, t.view, grad_dtype);
        parts_.push_back({a, b, own, &chosen, t.layout, chosen.prepare(own, t.view)});
      }
  }

  std::unique_ptr<PreparedConv> refilled(const SparseWeights& w, int threads) const override {
    std::vector<Part> parts;
    for (const Part& part : parts_) {
      if (part.layout == nullptr) return nullptr;
      OwnedWeights t;
      part.layout->fill(w, t, threads);
      t.view.threads = threads;
      std::unique_ptr<PreparedConv> conv = part.conv->refilled(t.view, threads);
      if (conv == nullptr) conv = part.kernel->prepare(part.shape, t.view);
      parts.push_back({part.row, part.column, part.shape, part.kernel, part.layout, std::move(conv)});
    }
    return std::unique_ptr<PreparedConv>(new PreparedInputGradient(shape_, std::move(parts)));
  }

  // call.x is dy [N, P, Q, K], call.y is dx [N, H, W, C].
  void run(const ConvCall& call) const override {
    const int64_t row = shape_.W * shape_.C;
    for (const Part& part : parts_) {
      ConvCall own = call;
      own.y_stride_n = shape_.H * row;
      own.y_stride_h = shape_.stride_h * row;
      own.y_stride_w = shape_.stride_w * shape_.C;
      own.y = static_cast<char*>(call.y) + (part.row * row + part.column * shape_.C) * bytes_of(call.y_dtype);
      part.conv->run(own);
    }
  }

 private:
  struct Part {
    int64_t row, column;
    ConvShape shape;
    const SparseConvKernel* kernel;
    std::shared_ptr<const TransposedWeights> layout;  // null where the weights are other ones each time
    std::unique_ptr<PreparedConv> conv;
  };
  PreparedInputGradient(const ConvShape& s, std::vector<Part> parts) : shape_(s), parts_(std::move(parts)) {}
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
  const auto transpose_class = [&](const AxisClass& h, const AxisClass& w) {
    OwnedWeights t;
    t.layout = std::make_shared<const TransposedWeights>(shape, weights, h.tap, w.tap);
    t.layout->fill(weights, t, weights.threads);
    t.view.threads = weights.threads;
    return t;
  };
  return prepare_input_gradient(shape, transpose_class, grad_dtype, kernel);
}

}  // namespace vpns
