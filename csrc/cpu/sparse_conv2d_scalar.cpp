// The plain loop over kept weights, for every CPU and for double precision: the kernels' own reference.
#include <algorithm>
#include <cmath>

#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(std::isnan(value) ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float read(float value) { return value; }
double read(double value) { return value; }
float read(uint16_t value) { return bf16_to_float(value); }
template <typename A>
void write(A* to, A value) { *to = value; }
void write(uint16_t* to, float value) { *to = to_bf16(value); }

// One kept weight: where it reads, and its value in the type of the sums.
template <typename A>
struct Tap {
  int64_t k, c, r, s;
  A weight;
};

template <typename A>
class PreparedScalar final : public PreparedConv {
 public:
  PreparedScalar(const ConvShape& s, const SparseWeights& w) : shape_(s), starts_(s.K + 1, 0) {
    const int64_t filters = s.K / s.groups, channels = s.C / s.groups, taps = s.R * s.S;
    const int64_t rows_per_group = w.format == Format::kBlock ? (filters + w.bk - 1) / w.bk : filters;
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t k = 0; k < filters; ++k) {
        const int64_t row = g * rows_per_group + k / w.bk, in_block = k % w.bk;
        for (int32_t i = w.indptr[row]; i < w.indptr[row + 1]; ++i) {
          const int64_t first = w.index[i] / taps * w.bc, r = w.index[i] % taps / s.S, col = w.index[i] % s.S;
          for (int64_t c = first; c < std::min(first + w.bc, channels); ++c)
            taps_.push_back({g * filters + k, g * channels + c, r, col, at(w, (i * w.bk + in_block) * w.bc + c - first)});
        }
        starts_[g * filters + k + 1] = static_cast<int64_t>(taps_.size());
      }
  }

  void run(const ConvCall& call) const override {
    if (call.x_dtype == DType::kF64) return run_typed<double, double>(call);
    if (call.x_dtype == DType::kBF16)
      return call.y_dtype == DType::kBF16 ? run_typed<uint16_t, uint16_t>(call) : run_typed<uint16_t, float>(call);
    return call.y_dtype == DType::kBF16 ? run_typed<float, uint16_t>(call) : run_typed<float, float>(call);
  }

 private:
  static A at(const SparseWeights& w, int64_t i) {
    if (w.dtype == DType::kF64) return static_cast<A>(static_cast<const double*>(w.values)[i]);
    return static_cast<A>(weight_at(w, i));
  }

  template <typename X, typename Y>
  void run_typed(const ConvCall& call) const {
    if constexpr (std::is_same_v<X, double> != std::is_same_v<A, double>) {
      return;  // why_not keeps double inputs and double sums together
    } else {
      const ConvShape& s = shape_;
      const X* x = static_cast<const X*>(call.x);
      Y* y = static_cast<Y*>(call.y);
      const A* bias = static_cast<const A*>(call.bias);
#pragma omp parallel for num_threads(call.threads) schedule(static)
      for (int64_t pixel = 0; pixel < s.N * s.P * s.Q; ++pixel) {
        const int64_t n = pixel / (s.P * s.Q), p = pixel / s.Q % s.P, q = pixel % s.Q;
        for (int64_t k = 0; k < s.K; ++k) {
          A sum = bias ? bias[k] : A(0);
          for (int64_t t = starts_[k]; t < starts_[k + 1]; ++t) {
            const Tap<A>& tap = taps_[t];
            const int64_t h = p * s.stride_h + tap.r * s.dilation_h - s.pad_h;
            const int64_t w = q * s.stride_w + tap.s * s.dilation_w - s.pad_w;
            if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
            sum += tap.weight * read(x[n * call.x_stride_n + h * call.x_stride_h + w * call.x_stride_w + tap.c]);
          }
          write(y + pixel * s.K + k, sum);
        }
      }
    }
  }

  ConvShape shape_;
  std::vector<Tap<A>> taps_;
  std::vector<int64_t> starts_;
};

std::string why_not(const ConvShape&, const SparseWeights& weights, DType x_dtype) {
  const bool double_x = x_dtype == DType::kF64, double_weights = weights.dtype == DType::kF64;
  return double_x == double_weights ? "" : "double inputs go with double weights";
}

std::unique_ptr<PreparedConv> prepare(const ConvShape& s, const SparseWeights& weights) {
  if (weights.dtype == DType::kF64) return std::make_unique<PreparedScalar<double>>(s, weights);
  return std::make_unique<PreparedScalar<float>>(s, weights);
}

}  // namespace

void add_scalar_kernels(std::vector<SparseConvKernel>& table) {
  table.push_back({"scalar", Isa::kScalar, false, why_not, prepare});
}

}  // namespace vpns
