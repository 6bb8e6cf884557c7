// Every sparse convolution kernel of this machine, emulated ones included, against a dense loop in double precision; and
// the threshold selection against a sort.
//
// usage: kernels_test [rounds [seed]]. Prints one line per kernel and ends with "N passed, 0 failed"; exit code 1 on any
// difference. Links neither torch nor Python, so that it also runs under sanitizers and emulators.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "cpu/kernels.h"

using namespace vpns;

namespace {

std::mt19937 generator;

int64_t pick(std::initializer_list<int64_t> values) {
  std::uniform_int_distribution<size_t> index(0, values.size() - 1);
  return *(values.begin() + index(generator));
}

float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(generator); }

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Case {
  ConvShape s;
  bool block;
  int64_t bk = 1, bc = 1;
  double density;
  bool half, half_out, bias;
  int threads;
};

Case make_case() {
  Case c{};
  ConvShape& s = c.s;
  c.block = pick({0, 1});
  s.groups = pick({1, 1, 1, 2, 4});
  s.N = pick({0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33});
  const int64_t unit = c.block ? pick({1, 4, 16, 16, 32, 32, 48, 64}) : 1;
  c.bk = unit;
  c.bc = c.block ? pick({unit, unit, 16, 32}) : 1;
  s.C = s.groups * pick({1, 2, 3, 5, 8, 16, 17, 31, 32, 33, 40});
  const int64_t filters = pick({1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 70});
  s.K = s.groups * (s.groups > 1 ? c.bk * pick({1, 2}) : filters);
  s.R = pick({1, 1, 2, 3, 3, 5, 7});
  s.S = pick({1, 1, 2, 3, 3, 5, 7});
  s.stride_h = pick({1, 1, 2, 3});
  s.stride_w = pick({1, 1, 2, 3});
  s.dilation_h = pick({1, 1, 2, 3});
  s.dilation_w = pick({1, 1, 2, 3});
  s.pad_h = pick({0, 1, 2, 3});
  s.pad_w = pick({0, 1, 2, 3});
  const int64_t reach_h = s.dilation_h * (s.R - 1) + 1, reach_w = s.dilation_w * (s.S - 1) + 1;
  s.H = std::max<int64_t>(pick({1, 2, 5, 7, 8, 13, 14, 19}), reach_h - 2 * s.pad_h);
  s.W = std::max<int64_t>(pick({1, 2, 5, 7, 8, 13, 14, 31}), reach_w - 2 * s.pad_w);
  s.P = (s.H + 2 * s.pad_h - reach_h) / s.stride_h + 1;
  s.Q = (s.W + 2 * s.pad_w - reach_w) / s.stride_w + 1;
  c.density = std::vector<double>{0.0, 0.02, 0.1, 0.3, 1.0}[pick({0, 1, 2, 3, 4})];
  c.half = pick({0, 1});
  c.half_out = pick({0, 1});
  c.bias = pick({0, 1});
  c.threads = static_cast<int>(pick({1, 2, 3}));
  return c;
}

struct Layer {
  std::vector<float> values;
  std::vector<uint16_t> half_values;
  std::vector<int32_t> indptr{0}, index;
};

Layer make_layer(const Case& c) {
  const ConvShape& s = c.s;
  Layer layer;
  const int64_t rows = s.groups * ((s.K / s.groups + c.bk - 1) / c.bk);
  const int64_t columns = (s.C / s.groups + c.bc - 1) / c.bc * s.R * s.S;
  std::bernoulli_distribution keep(c.density);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      if (!keep(generator)) continue;
      layer.index.push_back(static_cast<int32_t>(column));
      for (int64_t k = 0; k < c.bk; ++k)
        for (int64_t i = 0; i < c.bc; ++i) {
          const bool inside = row % (rows / s.groups) * c.bk + k < s.K / s.groups &&
                              column / (s.R * s.S) * c.bc + i < s.C / s.groups;
          const uint16_t half = inside ? to_bf16(uniform()) : 0;
          layer.half_values.push_back(half);
          layer.values.push_back(from_bf16(half));
        }
    }
    layer.indptr.push_back(static_cast<int32_t>(layer.index.size()));
  }
  return layer;
}

// Dense convolution in double, and Σ |w| |x| beside it.
void dense(const Case& c, const Layer& layer, const std::vector<float>& x, const std::vector<float>& bias,
           std::vector<double>& y, std::vector<double>& scale) {
  const ConvShape& s = c.s;
  const int64_t taps = s.R * s.S, filters = s.K / s.groups, channels = s.C / s.groups;
  const int64_t rows_per_group = (filters + c.bk - 1) / c.bk;
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t p = 0; p < s.P; ++p)
      for (int64_t q = 0; q < s.Q; ++q)
        for (int64_t k = 0; k < s.K; ++k) {
          double sum = c.bias ? bias[k] : 0.0, size = std::abs(sum);
          const int64_t g = k / filters, row = g * rows_per_group + k % filters / c.bk;
          for (int32_t i = layer.indptr[row]; i < layer.indptr[row + 1]; ++i) {
            const int64_t r = layer.index[i] % taps / s.S, t = layer.index[i] % s.S;
            const int64_t h = p * s.stride_h + r * s.dilation_h - s.pad_h;
            const int64_t w = q * s.stride_w + t * s.dilation_w - s.pad_w;
            if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
            for (int64_t j = 0; j < c.bc; ++j) {
              const int64_t channel = layer.index[i] / taps * c.bc + j;
              if (channel >= channels) break;
              const double weight = layer.values[(i * c.bk + k % filters % c.bk) * c.bc + j];
              const double term = weight * x[((n * s.H + h) * s.W + w) * s.C + g * channels + channel];
              sum += term;
              size += std::abs(term);
            }
          }
          y.push_back(sum);
          scale.push_back(size);
        }
}

// Whether the selection finds what a sort finds, over tensors of any length with ties, infinities and (rarely) NaN.
bool select_is_right() {
  const bool nan = pick({0, 0, 0, 1}), ties = pick({0, 1});
  std::vector<std::vector<float>> tensors;
  std::vector<float> sorted;
  for (int64_t i = pick({1, 2, 5}); i > 0; --i) {
    tensors.emplace_back();
    for (int64_t n = pick({0, 1, 3, 4, 100, 4097}); n > 0; --n) {
      const float value = pick({0, 0, 0, 0, 1}) ? std::copysign(std::numeric_limits<float>::infinity(), uniform()) : uniform();
      tensors.back().push_back(ties ? std::round(value * 4) / 4 : value);
    }
  }
  tensors.back().push_back(0.5f);
  if (nan) tensors.back().back() = -std::numeric_limits<float>::quiet_NaN();
  std::vector<const float*> data;
  std::vector<int64_t> counts;
  for (const auto& tensor : tensors) {
    data.push_back(tensor.data());
    counts.push_back(static_cast<int64_t>(tensor.size()));
    for (float value : tensor) sorted.push_back(std::abs(value));
  }
  const int64_t total = static_cast<int64_t>(sorted.size());
  const int64_t kept = std::uniform_int_distribution<int64_t>(1, total)(generator);
  const Threshold found = select_threshold(data, counts, kept, static_cast<int>(pick({1, 2, 3})));
  if (nan) return std::isnan(found.value);
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  const float expected = sorted[kept - 1];
  const int64_t above = std::count_if(sorted.begin(), sorted.end(), [expected](float v) { return v > expected; });
  return found.value == expected && found.ties_kept == kept - above;
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  generator.seed(argc > 2 ? std::atoi(argv[2]) : 1);
  std::map<std::string, long> passed;
  long failed = 0;
  for (int round = 0; round < rounds; ++round) {
    if (select_is_right()) ++passed["select_threshold"];
    else {
      ++failed;
      std::printf("FAILED select_threshold round %d\n", round);
    }
    const Case c = make_case();
    const ConvShape& s = c.s;
    const Layer layer = make_layer(c);
    std::vector<float> x(s.N * s.H * s.W * s.C), bias(s.K);
    std::vector<uint16_t> half_x;
    for (float& value : x) {
      half_x.push_back(to_bf16(uniform()));
      value = from_bf16(half_x.back());
    }
    for (float& value : bias) value = uniform();
    std::vector<double> expected, scale;
    dense(c, layer, x, bias, expected, scale);
    for (const bool half_weights : {false, true}) {
      const SparseWeights weights{c.block ? Format::kBlock : Format::kUnstructured,
                                  half_weights ? DType::kBF16 : DType::kF32,
                                  half_weights ? static_cast<const void*>(layer.half_values.data())
                                               : static_cast<const void*>(layer.values.data()),
                                  layer.indptr.data(),
                                  layer.index.data(),
                                  static_cast<int64_t>(layer.index.size()),
                                  c.bk,
                                  c.bc};
      check_sparse_conv2d(s, weights);
      const DType x_type = c.half ? DType::kBF16 : DType::kF32, y_type = c.half_out ? DType::kBF16 : DType::kF32;
      for (const SparseConvKernel& kernel : sparse_conv2d_kernels()) {
        if (!isa_usable(kernel.isa) || !kernel.why_not(s, weights, x_type).empty()) continue;
        const auto prepared = kernel.prepare(s, weights);
        // NaN where nothing was written, and guard bands on both sides.
        const int64_t guard = 64, count = static_cast<int64_t>(expected.size());
        std::vector<float> y(count + 2 * guard, std::numeric_limits<float>::quiet_NaN());
        std::vector<uint16_t> half_y(count + 2 * guard, 0x7fff);
        void* out = c.half_out ? static_cast<void*>(half_y.data() + guard) : static_cast<void*>(y.data() + guard);
        prepared->run({c.half ? static_cast<const void*>(half_x.data()) : static_cast<const void*>(x.data()), x_type,
                       s.H * s.W * s.C, s.W * s.C, s.C, out, y_type, c.bias ? bias.data() : nullptr, c.threads});
        bool good = true;
        for (int64_t i = 0; i < guard; ++i)
          good = good && half_y[i] == 0x7fff && half_y[count + guard + i] == 0x7fff && std::isnan(y[i]) &&
                 std::isnan(y[count + guard + i]);
        double worst = 0;
        for (int64_t i = 0; i < count; ++i) {
          const double got = c.half_out ? from_bf16(half_y[guard + i]) : y[guard + i];
          const double bound = 1e-6 * scale[i] + (c.half_out ? std::abs(expected[i]) / 256 : 0) + 1e-30;
          const double error = std::abs(got - expected[i]);
          if (!(error <= bound)) good = false;
          worst = std::max(worst, std::isnan(error) ? 1e9 : error / bound);
        }
        if (good) ++passed[kernel.name];
        else {
          ++failed;
          std::printf("FAILED %s round %d: N%ld C%ld H%ld W%ld K%ld R%ld S%ld stride %ld,%ld pad %ld,%ld dilation %ld,%ld "
                      "groups %ld block %ldx%ld density %g half %d,%d,%d threads %d: %g times the bound\n",
                      kernel.name, round, s.N, s.C, s.H, s.W, s.K, s.R, s.S, s.stride_h, s.stride_w, s.pad_h, s.pad_w,
                      s.dilation_h, s.dilation_w, s.groups, c.bk, c.bc, c.density, half_weights, c.half, c.half_out,
                      c.threads, worst);
        }
      }
    }
  }
  long total = 0;
  for (const auto& [name, count] : passed) {
    std::printf("%s: %ld\n", name.c_str(), count);
    total += count;
  }
  std::printf("%ld passed, %ld failed\n", total, failed);
  return failed == 0 && total > 0 ? 0 : 1;
}
