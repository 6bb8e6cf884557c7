// The plain loop over kept weights, for every CPU and every type: the kernels' own reference, so its sums are double.
#include <algorithm>

#include "arithmetic.h"
#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

template <typename X>
double read(X value) { return value; }
double read(Bf16 value) { return bf16_to_float(value.bits); }
double read(Fp16 value) { return fp16_to_float(value.bits); }
template <typename Y>
void write(Y* to, double value) { *to = static_cast<Y>(value); }
void write(Bf16* to, double value) { to->bits = float_to_bf16(static_cast<float>(value)); }
void write(Fp16* to, double value) {
  const _Float16 half = static_cast<_Float16>(static_cast<float>(value));
  std::memcpy(to, &half, sizeof half);
}
double activate(double value, Act act) {
  if (act == Act::kNone) return value;
  value = value < 0 ? 0 : value;
  return act == Act::kRelu6 && value > 6 ? 6 : value;
}

// One kept weight and where it reads.
struct Tap {
  int64_t c, r, s;
  double weight;
};

class PreparedScalar final : public PreparedConv {
 public:
  PreparedScalar(const ConvShape& s, const SparseWeights& w) : shape_(s), starts_(s.K + 1, 0) {
    const int64_t filters = s.K / s.groups, channels = s.C / s.groups, taps = s.R * s.S;
    const int64_t rows_per_group = w.format == Format::kBlock ? ceil_div(filters, w.bk) : filters;
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t k = 0; k < filters; ++k) {
        if (w.format == Format::kChannel) {
          add_channel_filter(w, k, taps);
          starts_[k + 1] = static_cast<int64_t>(taps_.size());
          continue;
        }
        const int64_t row = g * rows_per_group + k / w.bk, in_block = k % w.bk;
        for (int32_t i = w.indptr[row]; i < w.indptr[row + 1]; ++i) {
          const int64_t first = w.index[i] / taps * w.bc, r = w.index[i] % taps / s.S, col = w.index[i] % s.S;
          for (int64_t c = first; c < std::min(first + w.bc, channels); ++c)
            taps_.push_back({g * channels + c, r, col, at(w, (i * w.bk + in_block) * w.bc + c - first)});
        }
        starts_[g * filters + k + 1] = static_cast<int64_t>(taps_.size());
      }
  }

  bool takes_any_batch() const override { return true; }

  void run(const ConvCall& call) const override {
    if (call.x_dtype == DType::kF64) return run_typed<double, double>(call);
    if (call.x_dtype == DType::kBF16) return run_from<Bf16>(call);
    if (call.x_dtype == DType::kF16) return run_from<Fp16>(call);
    run_from<float>(call);
  }

 private:
  void add_channel_filter(const SparseWeights& w, int64_t k, int64_t taps) {
    const int32_t* row = std::lower_bound(w.indptr, w.indptr + w.count, static_cast<int32_t>(k));
    if (row == w.indptr + w.count || *row != k) return;
    for (int64_t j = 0; j < w.columns; ++j)
      for (int64_t tap = 0; tap < taps; ++tap)
        taps_.push_back(
            {w.index[j], tap / shape_.S, tap % shape_.S, at(w, ((row - w.indptr) * w.columns + j) * taps + tap)});
  }

  static double at(const SparseWeights& w, int64_t i) {
    return w.dtype == DType::kF64 ? static_cast<const double*>(w.values)[i] : weight_at(w, i);
  }

  static double bias_at(const ConvCall& call, int64_t k) {
    if (call.bias == nullptr) return 0.0;
    return call.x_dtype == DType::kF64 ? static_cast<const double*>(call.bias)[k]
                                       : static_cast<const float*>(call.bias)[k];
  }

  template <typename X>
  void run_from(const ConvCall& call) const {
    if (call.y_dtype == DType::kBF16) return run_typed<X, Bf16>(call);
    if (call.y_dtype == DType::kF16) return run_typed<X, Fp16>(call);
    run_typed<X, float>(call);
  }

  template <typename X, typename Y>
  void run_typed(const ConvCall& call) const {
    const ConvShape& s = shape_;
    const X* x = static_cast<const X*>(call.x);
    Y* y = static_cast<Y*>(call.y);
    const Y* residual = static_cast<const Y*>(call.residual);
#pragma omp parallel for num_threads(call.threads) schedule(static)
    for (int64_t pixel = 0; pixel < call.batch(s) * s.P * s.Q; ++pixel) {
      const int64_t n = pixel / (s.P * s.Q), p = pixel / s.Q % s.P, q = pixel % s.Q;
      const int64_t at = call.y_at(s, n, p, q);
      for (int64_t k = 0; k < s.K; ++k) {
        double sum = bias_at(call, k);
        for (int64_t t = starts_[k]; t < starts_[k + 1]; ++t) {
          const Tap& tap = taps_[t];
          const int64_t h = p * s.stride_h + tap.r * s.dilation_h - s.pad_h;
          const int64_t w = q * s.stride_w + tap.s * s.dilation_w - s.pad_w;
          if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
          sum += tap.weight * read(x[n * call.x_stride_n + h * call.x_stride_h + w * call.x_stride_w + tap.c]);
        }
        if (residual != nullptr) sum += read(residual[at + k]);
        write(y + at + k, activate(sum, call.act));
      }
    }
  }

  ConvShape shape_;
  std::vector<Tap> taps_;
  std::vector<int64_t> starts_;
};

std::string why_not(const ConvShape&, const SparseWeights& weights, DType x_dtype) {
  const bool double_x = x_dtype == DType::kF64, double_weights = weights.dtype == DType::kF64;
  return double_x == double_weights ? "" : "double inputs go with double weights";
}

std::unique_ptr<PreparedConv> prepare(const ConvShape& s, const SparseWeights& weights) {
  return std::make_unique<PreparedScalar>(s, weights);
}

}  // namespace

void add_scalar_kernels(std::vector<SparseConvKernel>& table) {
  table.push_back({"scalar", Isa::kScalar, false, why_not, prepare});
}

}  // namespace vpns
