// Random layers for the sparse convolution kernels, and what they must give: a dense loop in double precision.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "chance.h"
#include "guarded.h"
#include "params.h"

using vpns::Act;
using vpns::ConvShape;
using vpns::DType;
using vpns::Format;

// Where weights are kept: nowhere, once, anywhere, in every other row, or nearly all in the first row.
enum class Spread { kNone, kOne, kUniform, kHalfTheRows, kFirstRow };

struct Case {
  ConvShape s{};
  Format format = Format::kUnstructured;
  int64_t bk = 1, bc = 1;
  Spread spread = Spread::kUniform;
  double density = 0.1;
  DType x = DType::kF32, w = DType::kF32, y = DType::kF32;
  bool is_narrow = false;  // groups of few channels
  bool bias = false, residual = false;
  Act act = Act::kNone;
  double poison = 0;   // NaN or infinity in some inputs; 0: none
  int64_t gap = 0;     // elements of NaN between two pixels
  int memory = 0;      // order of the axes in memory: 0 N H W C, 1 H W N C, 2 one image for all
  bool at_back = true; // the forbidden page comes right after the arrays, else right before
};

// Multiplications that a case may cost its reference.
constexpr double kMostWork = 1.5e7;

inline double dense_work(const ConvShape& s) {
  return static_cast<double>(s.N * s.P * s.Q * s.K) * static_cast<double>(s.C / s.groups * s.R * s.S);
}

inline void draw_sizes(Case& c, bool large) {
  ConvShape& s = c.s;
  const int64_t unit = c.format == Format::kBlock ? pick({1, 4, 8, 16, 16, 32, 32, 48, 64}) : 1;
  c.bk = unit;
  c.bc = c.format == Format::kBlock ? pick<int64_t>({unit, unit, 16, 32}) : 1;
  s.groups = c.format == Format::kChannel ? 1 : pick({1, 1, 1, 2, 4});
  s.N = large ? pick({1, 2, 16, 17}) : pick({0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33});
  const int64_t channels = pick({1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 40});
  s.C = s.groups * (large ? pick({64, 96, 160, 257, 300}) / s.groups : channels);
  const int64_t filters = pick({1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 70});
  s.K = s.groups * (s.groups > 1 ? c.bk * pick({1, 2}) : filters);
  if (c.format == Format::kUnstructured && one_in(4)) s.groups = s.K = s.C = channels;  // depthwise
  c.is_narrow = c.format == Format::kBlock && one_in(3);
  if (c.is_narrow) {
    c.bk = c.bc = pick({4, 8});
    s.C = s.K = 16 * pick({1, 2, 3});
    s.groups = s.C / c.bk;
  }
  s.R = pick({1, 1, 2, 3, 3, 5, 7});
  s.S = one_in(2) ? s.R : pick({1, 1, 2, 3, 3, 5, 7});
  s.stride_h = pick({1, 1, 2, 3});
  s.stride_w = one_in(2) ? s.stride_h : pick({1, 1, 2, 3});
  s.dilation_h = pick({1, 1, 1, 2, 3});
  s.dilation_w = pick({1, 1, 1, 2, 3});
  if (c.is_narrow) {
    s.R = s.S = 3;
    s.stride_h = s.stride_w = pick({1, 2});
    s.dilation_h = s.dilation_w = 1;
  }
  s.pad_h = pick({0, 0, 1, 2, 3, 9});
  s.pad_w = pick({0, 0, 1, 2, 3, 9});
  const int64_t reach_h = s.dilation_h * (s.R - 1) + 1, reach_w = s.dilation_w * (s.S - 1) + 1;
  const auto side = [large] {
    return large ? pick({14, 28, 33, 56}) : pick({1, 2, 5, 6, 7, 8, 11, 12, 13, 14, 19, 28, 29, 31});
  };
  s.H = std::max<int64_t>(side(), reach_h - 2 * s.pad_h);
  s.W = std::max<int64_t>(side(), reach_w - 2 * s.pad_w);
  s.P = (s.H + 2 * s.pad_h - reach_h) / s.stride_h + 1;
  s.Q = (s.W + 2 * s.pad_w - reach_w) / s.stride_w + 1;
}

inline Case draw_case() {
  const bool large = one_in(10);
  Case c;
  c.format = pick({Format::kUnstructured, Format::kBlock, Format::kBlock, Format::kChannel});
  do draw_sizes(c, large);
  while (dense_work(c.s) > (large ? 20 : 5) * kMostWork);
  c.spread = large ? Spread::kUniform
                   : pick({Spread::kNone, Spread::kOne, Spread::kUniform, Spread::kUniform, Spread::kUniform,
                           Spread::kHalfTheRows, Spread::kFirstRow});
  c.density = std::min(pick({0.02, 0.1, 0.3, 1.0}), kMostWork / std::max(dense_work(c.s), 1.0));
  if (c.is_narrow) {  // with all its weights, as the kernels of such groups want them
    c.spread = Spread::kUniform;
    c.density = 1.0;
  }
  c.x = pick({DType::kF32, DType::kF32, DType::kBF16, DType::kBF16, DType::kF16, DType::kF64});
  const DType three[] = {DType::kF32, DType::kBF16, DType::kF16};
  c.w = c.x == DType::kF64 ? DType::kF64 : one_in(2) ? c.x : three[pick({0, 1, 2})];
  c.y = c.x == DType::kF64 ? DType::kF64 : one_in(2) ? c.x : three[pick({0, 1, 2})];
  c.bias = one_in(2);
  c.residual = one_in(3);
  c.act = pick({Act::kNone, Act::kNone, Act::kRelu, Act::kRelu6});
  const double infinity = std::numeric_limits<double>::infinity();
  c.poison = one_in(4) ? pick({std::nan(""), infinity, -infinity}) : 0;
  c.gap = pick({0, 0, 1, 5});
  c.memory = static_cast<int>(pick({0, 0, 0, 1, 2}));
  c.at_back = !one_in(3);
  return c;
}

inline std::string describe(const Case& c) {
  const char* formats[] = {"unstructured", "block", "channel"};
  const char* types[] = {"f32", "bf16", "f64", "f16"};
  const char* acts[] = {"none", "relu", "relu6"};
  const char* spreads[] = {"nothing", "one weight", "anywhere", "every other row", "first row"};
  const auto type = [&types](DType t) { return types[static_cast<int>(t)]; };
  const ConvShape& s = c.s;
  char text[512];
  std::snprintf(text, sizeof text,
                "N%ld C%ld H%ld W%ld K%ld R%ld S%ld P%ld Q%ld stride %ld,%ld pad %ld,%ld dilation %ld,%ld groups %ld "
                "%s %ldx%ld kept %s density %g x %s w %s y %s bias %d residual %d act %s poison %g gap %ld memory %d "
                "at the %s",
                s.N, s.C, s.H, s.W, s.K, s.R, s.S, s.P, s.Q, s.stride_h, s.stride_w, s.pad_h, s.pad_w, s.dilation_h,
                s.dilation_w, s.groups, formats[static_cast<int>(c.format)], c.bk, c.bc,
                spreads[static_cast<int>(c.spread)], c.density, type(c.x), type(c.w), type(c.y), c.bias, c.residual,
                acts[static_cast<int>(c.act)], c.poison, c.gap, c.memory, c.at_back ? "back" : "front");
  return text;
}

// Packed weights, and beside them the same weights as a list of taps for each output channel.
struct Layer {
  struct Tap {
    int64_t c, r, s;
    double weight;
  };
  GuardedArray values;
  Guarded indptr, index;
  int64_t count, columns;
  std::vector<std::vector<Tap>> filters;
};

inline Guarded guarded_ints(const std::vector<int32_t>& numbers, bool at_back) {
  Guarded memory(numbers.size() * sizeof(int32_t), at_back);
  std::copy(numbers.begin(), numbers.end(), memory.as<int32_t>());
  return memory;
}

// A kept weight: any number but, now and then, an explicit zero.
inline double draw_weight() { return one_in(40) ? 0.0 : uniform(); }

inline Layer make_channel_layer(const Case& c) {
  const ConvShape& s = c.s;
  const double share = c.spread == Spread::kNone ? 0.0 : one_in(4) ? 1.0 : std::sqrt(c.density);
  const auto draw_list = [](int64_t count, double keep) {
    std::vector<int32_t> list;
    for (int64_t i = 0; i < count; ++i)
      if (std::bernoulli_distribution(keep)(generator)) list.push_back(static_cast<int32_t>(i));
    return list;
  };
  const auto kept_out = draw_list(s.K, c.spread == Spread::kHalfTheRows ? 0.5 : share);
  const auto kept_in = c.spread == Spread::kOne ? std::vector<int32_t>{static_cast<int32_t>(s.C - 1)}
                                                : draw_list(s.C, one_in(4) ? 1.0 : share);
  const int64_t count = kept_out.size(), columns = kept_in.size();
  Layer layer{GuardedArray(c.w, count * columns * s.R * s.S, c.at_back), guarded_ints(kept_out, c.at_back),
              guarded_ints(kept_in, c.at_back), count, columns, {}};
  layer.filters.resize(s.K);
  int64_t at = 0;
  for (const int32_t k : kept_out)
    for (const int32_t channel : kept_in)
      for (int64_t tap = 0; tap < s.R * s.S; ++tap)
        layer.filters[k].push_back({channel, tap / s.S, tap % s.S, layer.values.set(at++, draw_weight())});
  return layer;
}

// Unstructured or block weights (an unstructured weight is a block of one).
inline Layer make_indexed_layer(const Case& c) {
  const ConvShape& s = c.s;
  const int64_t filters = s.K / s.groups, channels = s.C / s.groups, taps = s.R * s.S;
  const int64_t rows_per_group = vpns::ceil_div(filters, c.bk), rows = s.groups * rows_per_group;
  const int64_t columns = vpns::ceil_div(channels, c.bc) * taps;
  const int64_t one = std::uniform_int_distribution<int64_t>(0, rows * columns - 1)(generator);
  const auto is_kept = [&](int64_t row, int64_t column) {
    if (c.spread == Spread::kNone) return false;
    if (c.spread == Spread::kOne) return row * columns + column == one;
    const bool anyway = std::bernoulli_distribution(c.density)(generator);
    if (c.spread == Spread::kHalfTheRows) return row % 2 == one % 2 && anyway;
    return c.spread == Spread::kFirstRow ? row == 0 || (anyway && one_in(20)) : anyway;
  };
  std::vector<int32_t> indptr{0}, index;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column)
      if (is_kept(row, column)) index.push_back(static_cast<int32_t>(column));
    indptr.push_back(static_cast<int32_t>(index.size()));
  }
  Layer layer{GuardedArray(c.w, static_cast<int64_t>(index.size()) * c.bk * c.bc, c.at_back),
              guarded_ints(indptr, c.at_back),
              guarded_ints(index, c.at_back),
              static_cast<int64_t>(index.size()),
              0,
              {}};
  layer.filters.resize(s.K);
  int64_t at = 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int32_t i = indptr[row]; i < indptr[row + 1]; ++i)
      for (int64_t k = row % rows_per_group * c.bk; k < (row % rows_per_group + 1) * c.bk; ++k)
        for (int64_t j = 0; j < c.bc; ++j) {
          const int64_t channel = index[i] / taps * c.bc + j, group = row / rows_per_group;
          const bool inside = k < filters && channel < channels;  // a ragged block goes on with zeros
          const double weight = layer.values.set(at++, inside ? draw_weight() : 0.0);
          if (inside)
            layer.filters[group * filters + k].push_back(
                {group * channels + channel, index[i] % taps / s.S, index[i] % s.S, weight});
        }
  return layer;
}

inline Layer make_layer(const Case& c) {
  return c.format == Format::kChannel ? make_channel_layer(c) : make_indexed_layer(c);
}

// The input in its place in memory, the other operands, and the outputs with Σ |w| |x| beside them.
struct Operands {
  GuardedArray x, bias, residual;
  int64_t stride_n, stride_h, stride_w;
  std::vector<double> expected, scale;
};

inline GuardedArray draw_array(DType type, int64_t count, double size, bool at_back) {
  GuardedArray array(type, count, at_back);
  for (int64_t i = 0; i < count; ++i) array.set(i, size * uniform());
  return array;
}

inline Operands make_operands(const Case& c, const Layer& layer) {
  const ConvShape& s = c.s;
  const int64_t pixel = s.C + c.gap, outputs = s.N * s.P * s.Q * s.K;
  int64_t stride_w = pixel, stride_h = (s.W + c.gap) * pixel, stride_n = (s.H + c.gap) * stride_h;
  if (c.memory == 1) stride_n = pixel, stride_w = s.N * pixel, stride_h = s.W * stride_w;
  if (c.memory == 2) stride_n = 0;
  const int64_t last = (s.N - 1) * stride_n + (s.H - 1) * stride_h + (s.W - 1) * stride_w;
  Operands o{GuardedArray(c.x, s.N == 0 ? 0 : last + s.C, c.at_back),
             draw_array(c.x == DType::kF64 ? DType::kF64 : DType::kF32, c.bias ? s.K : 0, 1.0, c.at_back),
             draw_array(c.y, c.residual ? outputs : 0, 4.0, c.at_back),
             stride_n, stride_h, stride_w, {}, {}};
  std::vector<double> x(s.N * s.H * s.W * s.C);
  for (int64_t i = 0; i < static_cast<int64_t>(x.size()); ++i) {
    const int64_t n = i / (s.H * s.W * s.C), h = i / (s.W * s.C) % s.H, w = i / s.C % s.W;
    const bool poisoned = c.poison != 0 && std::uniform_int_distribution<size_t>(0, x.size() / 2)(generator) == 0;
    const int64_t place = n * stride_n + h * stride_h + w * stride_w + i % s.C;
    x[i] = c.memory == 2 && n > 0 ? o.x.get(place) : o.x.set(place, poisoned ? c.poison : uniform());
  }
  // An axis of length one may have any stride: nobody takes a step along it.
  const int64_t anything = int64_t{1} << 40;
  if (s.N == 1) o.stride_n = anything;
  if (s.H == 1) o.stride_h = anything;
  if (s.W == 1) o.stride_w = anything;
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t k = output % s.K, q = output / s.K % s.Q, p = output / (s.K * s.Q) % s.P;
    const int64_t n = output / (s.K * s.Q * s.P);
    double sum = c.bias ? o.bias.get(k) : 0.0, size = std::abs(sum);
    for (const Layer::Tap& tap : layer.filters[k]) {
      const int64_t h = p * s.stride_h + tap.r * s.dilation_h - s.pad_h;
      const int64_t w = q * s.stride_w + tap.s * s.dilation_w - s.pad_w;
      if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
      const double term = tap.weight * x[((n * s.H + h) * s.W + w) * s.C + tap.c];
      sum += term;
      size += std::abs(term);
    }
    if (c.residual) sum += o.residual.get(output), size += std::abs(o.residual.get(output));
    if (c.act != Act::kNone && sum < 0) sum = 0;
    if (c.act == Act::kRelu6 && sum > 6) sum = 6;
    o.expected.push_back(sum);
    o.scale.push_back(size);
  }
  return o;
}
