#include "cpu/transposed_weights.h"

#include <cstddef>
#include <memory>
#include <numeric>

#include "arithmetic.h"
#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

template <typename T>
void fill_units(const std::vector<int32_t>& from, int64_t bk, int64_t bc, const T* forward, T* to, int threads) {
  const int64_t count = static_cast<int64_t>(from.size()), unit = bk * bc;
#pragma omp parallel for num_threads(threads) if (threads > 1 && count * unit > kLeastSharedValues)
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < bc; ++c)
      for (int64_t k = 0; k < bk; ++k) to[i * unit + c * bk + k] = forward[from[i] * unit + k * bc + c];
}

}  // namespace

TransposedWeights::TransposedWeights(const ConvShape& s, const SparseWeights& w, const std::vector<int64_t>& taps_h,
                                     const std::vector<int64_t>& taps_w)
    : format_(w.format), bk_(w.bk), bc_(w.bc), count_(0) {
  if (w.format == Format::kChannel) list_channels(s, w, taps_h, taps_w);
  else list_entries(s, w, taps_h, taps_w);
}

// Channel weights: the lists change places, and the taps are picked in their order.
void TransposedWeights::list_channels(const ConvShape& s, const SparseWeights& w, const std::vector<int64_t>& taps_h,
                                      const std::vector<int64_t>& taps_w) {
  indptr_.assign(w.index, w.index + w.columns);
  index_.assign(w.indptr, w.indptr + w.count);
  for (int64_t c = 0; c < w.columns; ++c)
    for (int64_t k = 0; k < w.count; ++k)
      for (int64_t r : taps_h)
        for (int64_t col : taps_w)
          from_.push_back(static_cast<int32_t>(((k * w.columns + c) * s.R + r) * s.S + col));
  // A filter without taps is one tap of zeros.
  count_ = from_.empty() ? w.columns * w.count : static_cast<int64_t>(from_.size());
}

// Others: entries sorted by their new row, its input channel (block), by counting. In a forward row those of one
// channel stand side by side, taps rising; read backwards, the taps of the transposed filter rise.
void TransposedWeights::list_entries(const ConvShape& s, const SparseWeights& w, const std::vector<int64_t>& taps_h,
                                     const std::vector<int64_t>& taps_w) {
  const int64_t taps = s.R * s.S, own_taps = static_cast<int64_t>(taps_h.size() * taps_w.size());
  const int64_t rows_per_group = ceil_div(s.K / s.groups, w.bk), columns_per_group = ceil_div(s.C / s.groups, w.bc);
  std::vector<int32_t> own_tap(taps, -1), tap_of(columns_per_group * taps), channel_of(columns_per_group * taps);
  for (std::size_t i = 0; i < taps_h.size(); ++i)
    for (std::size_t j = 0; j < taps_w.size(); ++j)
      own_tap[taps_h[i] * s.S + taps_w[j]] = static_cast<int32_t>(i * taps_w.size() + j);
  // Of a flat place its tap here and its channel, so that nothing is divided entry by entry.
  for (int64_t flat = 0; flat < columns_per_group * taps; ++flat) {
    channel_of[flat] = static_cast<int32_t>(flat / taps);
    tap_of[flat] = own_tap[flat % taps];
  }
  indptr_.assign(s.groups * columns_per_group + 1, 0);
  for (int64_t row = 0; row < s.groups * rows_per_group; ++row)
    for (int32_t i = w.indptr[row]; i < w.indptr[row + 1]; ++i)
      if (tap_of[w.index[i]] >= 0) ++indptr_[row / rows_per_group * columns_per_group + channel_of[w.index[i]] + 1];
  std::partial_sum(indptr_.begin(), indptr_.end(), indptr_.begin());
  count_ = indptr_.back();
  index_.resize(count_);
  from_.resize(count_);
  std::vector<int32_t> next(indptr_.begin(), indptr_.end() - 1);
  for (int64_t row = 0; row < s.groups * rows_per_group; ++row) {
    int32_t* const next_of_group = next.data() + row / rows_per_group * columns_per_group;
    const int32_t column = static_cast<int32_t>(row % rows_per_group * own_taps);
    for (int32_t begin = w.indptr[row], end = begin; begin < w.indptr[row + 1]; begin = end) {
      const int32_t channel = channel_of[w.index[begin]];
      while (end < w.indptr[row + 1] && channel_of[w.index[end]] == channel) ++end;
      for (int32_t i = end - 1; i >= begin; --i) {
        const int32_t tap = tap_of[w.index[i]];
        if (tap < 0) continue;
        const int32_t at = next_of_group[channel]++;
        index_[at] = column + tap;
        from_[at] = i;
      }
    }
  }
}

void TransposedWeights::fill(const SparseWeights& forward, OwnedWeights& to, int threads) const {
  const int64_t bytes = bytes_of(forward.dtype);
  const int64_t total = count_ * bk_ * bc_ * bytes;
  to.values = from_.empty() ? std::make_unique<char[]>(total) : std::make_unique_for_overwrite<char[]>(total);
  const auto fill_as = [&](auto element) {
    using T = decltype(element);
    fill_units(from_, bk_, bc_, static_cast<const T*>(forward.values), reinterpret_cast<T*>(to.values.get()), threads);
  };
  if (bytes == 8) fill_as(uint64_t{});
  else if (bytes == 4) fill_as(uint32_t{});
  else fill_as(uint16_t{});
  to.view = {format_, forward.dtype, to.values.get(), indptr_.data(), index_.data(), count_, bc_, bk_};
  if (format_ == Format::kChannel)
    to.view = {format_, forward.dtype, to.values.get(), indptr_.data(), index_.data(),
               forward.columns, 1, 1, forward.count};
}

}  // namespace vpns
