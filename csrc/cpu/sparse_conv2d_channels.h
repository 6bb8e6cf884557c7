// Which channels channel weights keep, as bits by sixteen: the kernels gather inputs and scatter outputs by them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arithmetic.h"
#include "params.h"

namespace vpns {

// Consecutive output channels, some of which have sums.
struct OutputSpan {
  int64_t k0;
  int64_t span;        // how many output channels, pruned ones included
  int64_t count;       // how many have sums
  int64_t first_mask;  // where span > count: of the list of bits, one entry for each 16 channels from k0 on
};

// Kept input channels, a bit each; empty where all are.
inline std::vector<uint16_t> kept_inputs(const ConvShape& s, const SparseWeights& weights) {
  std::vector<uint16_t> keeps;
  if (weights.columns == s.C) return keeps;
  keeps.assign(ceil_div(s.C, 16), 0);
  for (int64_t j = 0; j < weights.columns; ++j)
    keeps[weights.index[j] / 16] |= static_cast<uint16_t>(1u << weights.index[j] % 16);
  return keeps;
}

// The outputs cut into spans of at most sums[i] sums each; at least one span, as pruned outputs have a bias too.
inline std::vector<OutputSpan> kept_outputs(const ConvShape& s, const SparseWeights& weights,
                                            const std::vector<int64_t>& sums, std::vector<uint16_t>& keeps) {
  std::vector<OutputSpan> spans;
  int64_t first = 0;
  for (int64_t most : sums) {
    const int64_t end = std::min(first + most, weights.count), k0 = first == 0 ? 0 : weights.indptr[first];
    const int64_t k1 = end < weights.count ? weights.indptr[end] : s.K;
    spans.push_back({k0, k1 - k0, end - first, static_cast<int64_t>(keeps.size())});
    if (k1 - k0 > end - first) {
      keeps.resize(keeps.size() + ceil_div(k1 - k0, 16), 0);
      uint16_t* bits = keeps.data() + spans.back().first_mask;
      for (int64_t i = first; i < end; ++i)
        bits[(weights.indptr[i] - k0) / 16] |= static_cast<uint16_t>(1u << (weights.indptr[i] - k0) % 16);
    }
    first = end;
  }
  return spans;
}

}  // namespace vpns
