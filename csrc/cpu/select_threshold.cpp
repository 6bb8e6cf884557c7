// The exact k-th largest magnitude of a list of float tensors, and the masks that follow.
//
// The magnitude of a float orders like its bits without the sign. A sample of the scores brackets the k-th; one pass
// over all of them counts what lies above the bracket, gathers what lies within (a hundredth or so), and writes masks
// as far as the bracket decides them. The few that were gathered give the k-th, and their own entries of the masks.
// Where the sample misled, or too many scores tie to be gathered, the bracket is moved or halved and the pass repeated:
// the result is exact whatever the sample says, and counts are integers, so the number of threads does not
// matter.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/select_threshold.h"

namespace vpns {
namespace {

constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int64_t kPiece = 1 << 18;
constexpr int64_t kSample = 1 << 15;
// How far the bracket reaches to both sides of the sample's k-th, in standard deviations of its rank.
constexpr double kDeviations = 3.5;
// Of a piece, as many scores may be gathered; more tie, or the bracket is wide.
constexpr int64_t kLeastGathered = 4096, kGatheredShare = 8;

// Scores that are compared before it is asked whether one of them lies within: four of any machine's vectors.
constexpr int kVectors = 4, kLanes = 4, kGroup = kVectors * kLanes;
using Lanes = int32_t __attribute__((vector_size(4 * kLanes)));

inline bool any(Lanes lanes) {
  int64_t words[2];
  std::memcpy(words, &lanes, sizeof words);
  return (words[0] | words[1]) != 0;
}

// Of magnitudes, signed and unsigned bits order alike; signed ones compare faster.
inline int32_t magnitude_bits(float value) {
  return static_cast<int32_t>(std::bit_cast<uint32_t>(value) & 0x7fffffffu);
}

struct Piece {
  const float* data;
  int64_t count;
  uint8_t* mask;  // null where none is wanted
};

// Bits of magnitudes, both ends within.
struct Range {
  int32_t low, high;
};

struct Candidate {
  int32_t bits, at;  // its place in its piece
};

// What one pass saw of a piece.
struct Look {
  int64_t above = 0, within = 0;
  bool has_nan = false;
  std::vector<Candidate> gathered;  // those within, in order, unless they were too many

  bool is_complete() const { return within == static_cast<int64_t>(gathered.size()); }
};

std::vector<Piece> split(const std::vector<const float*>& data, const std::vector<int64_t>& counts,
                         const std::vector<uint8_t*>& masks) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < data.size(); ++i)
    for (int64_t begin = 0; begin < counts[i]; begin += kPiece)
      pieces.push_back(
          {data[i] + begin, std::min(kPiece, counts[i] - begin), masks.empty() ? nullptr : masks[i] + begin});
  return pieces;
}

// The rank-th largest (from 0 on) of values within a range. Where they are many, by a count of equal steps of the range
// and a selection in the step that holds it.
int32_t nth_largest(std::vector<int32_t>& values, Range range, int64_t rank) {
  constexpr int kSteps = 1 << 12;
  if (values.size() > kSteps) {
    const int width = static_cast<int>(std::bit_width(static_cast<uint32_t>(range.high - range.low)));
    const int shift = std::max(0, width - 12);
    std::vector<int32_t> steps(kSteps, 0);
    for (int32_t value : values) ++steps[(value - range.low) >> shift];
    int step = kSteps - 1;
    while (rank >= steps[step]) rank -= steps[step--];
    std::vector<int32_t> inside;
    inside.reserve(steps[step]);
    for (int32_t value : values)
      if ((value - range.low) >> shift == step) inside.push_back(value);
    values.swap(inside);
  }
  std::nth_element(values.begin(), values.begin() + rank, values.end(), std::greater<int32_t>());
  return values[rank];
}

// Where the k-th largest should lie, from scores at even distances, each moved by a number drawn from its place:
// weights repeat themselves.
Range guess_range(const std::vector<Piece>& pieces, int64_t total, int64_t kept) {
  Range range{0, kInfinityBits};
  if (total <= kSample) return range;
  const int64_t stride = total / kSample;
  std::vector<int32_t> sample;
  sample.reserve(kSample);
  int64_t begin = 0, i = 0;
  for (const Piece& piece : pieces) {
    for (; i < kSample; ++i) {
      const int64_t at =
          i * stride + static_cast<int64_t>(static_cast<uint32_t>(i) * 2654435761u >> 8) % stride - begin;
      if (at >= piece.count) break;
      sample.push_back(magnitude_bits(piece.data[at]));
    }
    begin += piece.count;
  }
  const double share = static_cast<double>(kept) / static_cast<double>(total);
  const double rank = share * static_cast<double>(sample.size());
  const double reach = kDeviations * std::sqrt(rank * (1 - share)) + 2;
  const int64_t upper = static_cast<int64_t>(std::floor(rank - reach));
  const int64_t lower = static_cast<int64_t>(std::ceil(rank + reach));
  const Range all{0, std::numeric_limits<int32_t>::max()};  // NaN too, which the pass will find
  std::vector<int32_t> copy = sample;
  if (upper >= 0) range.high = std::min(nth_largest(copy, all, upper), kInfinityBits);
  if (lower < static_cast<int64_t>(sample.size())) range.low = std::min(nth_largest(sample, all, lower), range.high);
  return range;
}

// Bytes of 1 where lanes are -1.
inline void store_bytes(const Lanes (&lanes)[kVectors], uint8_t* to) {
  using Shorts = int16_t __attribute__((vector_size(16)));
  using Bytes = uint8_t __attribute__((vector_size(16)));
  const auto shorts = [&](int v) {
    return __builtin_shufflevector(reinterpret_cast<const Shorts&>(lanes[v]),
                                   reinterpret_cast<const Shorts&>(lanes[v + 1]), 0, 2, 4, 6, 8, 10, 12, 14);
  };
  const Shorts first = shorts(0), second = shorts(2);
  const Bytes &low = reinterpret_cast<const Bytes&>(first), &high = reinterpret_cast<const Bytes&>(second);
  const Bytes bytes = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) & 1;
  std::memcpy(to, &bytes, sizeof bytes);
}

// What lies within, in order; counted where it is too much to be gathered.
inline void gather(Look& look, int32_t bits, int64_t at, int64_t most) {
  ++look.within;
  if (static_cast<int64_t>(look.gathered.size()) < most) look.gathered.push_back({bits, static_cast<int32_t>(at)});
}

// Of a group, those whose lanes are set.
inline void gather_group(Look& look, const Piece& piece, int64_t begin, const Lanes (&within)[kVectors], int64_t most) {
  uint8_t bytes[kGroup];
  store_bytes(within, bytes);
  for (int64_t half = 0; half < kGroup; half += 8) {
    uint64_t set;
    std::memcpy(&set, bytes + half, sizeof set);
    for (; set != 0; set &= set - 1) {
      const int64_t at = begin + half + std::countr_zero(set) / 8;
      gather(look, magnitude_bits(piece.data[at]), at, most);
    }
  }
}

template <bool kMasks>
Look look_at(const Piece& piece, Range range) {
  Look look;
  const int64_t most = std::max(kLeastGathered, piece.count / kGatheredShare);
  const int32_t low = range.low - 1;  // vectors compare with > alone
  Lanes above{}, strange{};
  int64_t i = 0;
  for (; i + kGroup <= piece.count; i += kGroup) {
    Lanes larger[kVectors], within[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Lanes bits;
      std::memcpy(&bits, piece.data + i + v * kLanes, sizeof bits);
      bits &= 0x7fffffff;
      larger[v] = bits > range.high;
      above -= larger[v];
      strange |= bits > kInfinityBits;
      within[v] = (bits > low) & ~larger[v];
    }
    if constexpr (kMasks) store_bytes(larger, piece.mask + i);
    if (any((within[0] | within[1]) | (within[2] | within[3]))) gather_group(look, piece, i, within, most);
  }
  for (int lane = 0; lane < kLanes; ++lane) look.above += above[lane];
  look.has_nan = any(strange);
  for (; i < piece.count; ++i) {
    const int32_t bits = magnitude_bits(piece.data[i]);
    look.above += bits > range.high;
    look.has_nan = look.has_nan || bits > kInfinityBits;
    if (bits >= range.low && bits <= range.high) gather(look, bits, i, most);
    if constexpr (kMasks) piece.mask[i] = bits > range.high;
  }
  return look;
}

std::vector<Look> look_at_all(const std::vector<Piece>& pieces, Range range, int threads) {
  const int64_t count = static_cast<int64_t>(pieces.size());
  std::vector<Look> looks(pieces.size());
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < count; ++p)
    looks[p] = pieces[p].mask != nullptr ? look_at<true>(pieces[p], range) : look_at<false>(pieces[p], range);
  return looks;
}

// The masks' entries of scores that equal the threshold: the first `stay` of all.
void keep_ties(const std::vector<Piece>& pieces, const std::vector<Look>& looks, int32_t bits, int64_t stay) {
  for (size_t p = 0; p < pieces.size(); ++p) {
    if (looks[p].is_complete()) {
      for (const Candidate& candidate : looks[p].gathered)
        if (candidate.bits == bits && stay > 0) pieces[p].mask[candidate.at] = 1, --stay;
      continue;
    }
    for (int64_t i = 0; i < pieces[p].count && stay > 0; ++i)
      if (magnitude_bits(pieces[p].data[i]) == bits) pieces[p].mask[i] = 1, --stay;
  }
}

}  // namespace

Threshold select_threshold(const std::vector<const float*>& data, const std::vector<int64_t>& counts, int64_t kept,
                           int threads, const std::vector<uint8_t*>& masks, bool all_ties_or_none) {
  const std::vector<Piece> pieces = split(data, counts, masks);
  int64_t total = 0;
  for (const Piece& piece : pieces) total += piece.count;
  check(kept >= 1 && kept <= total, "select_threshold", "a count of the scores", kept);

  // The k-th lies between floor and ceiling.
  int32_t floor = 0, ceiling = kInfinityBits;
  Range range = guess_range(pieces, total, kept);
  std::vector<Look> looks;
  int64_t above, within;
  for (;;) {
    looks = look_at_all(pieces, range, threads);
    above = within = 0;
    bool is_complete = true;
    for (const Look& look : looks) {
      if (look.has_nan) return {std::numeric_limits<float>::quiet_NaN(), 0, 0};
      above += look.above;
      within += look.within;
      is_complete = is_complete && look.is_complete();
    }
    if (kept <= above) {
      floor = range.high + 1;
      range = {floor, ceiling};
    } else if (kept > above + within) {
      ceiling = range.low - 1;
      range = {floor, ceiling};
    } else if (is_complete || range.low == range.high) {
      break;
    } else {
      floor = range.low;
      ceiling = range.high;
      range.low = floor + (ceiling - floor) / 2 + 1;
    }
  }

  int32_t chosen = range.low;
  int64_t larger = 0, ties = within;
  if (range.low < range.high) {
    std::vector<int32_t> candidates;
    candidates.reserve(within);
    for (const Look& look : looks)
      for (const Candidate& candidate : look.gathered) candidates.push_back(candidate.bits);
    std::vector<int32_t> copy = candidates;
    chosen = nth_largest(copy, range, kept - above - 1);
    larger = std::count_if(candidates.begin(), candidates.end(), [chosen](int32_t bits) { return bits > chosen; });
    ties = std::count(candidates.begin(), candidates.end(), chosen);
  }
  const int64_t ties_wanted = kept - above - larger;
  const int64_t ties_kept = all_ties_or_none && ties_wanted < ties ? 0 : ties_wanted;
  if (!masks.empty()) {
    for (size_t p = 0; larger > 0 && p < pieces.size(); ++p)
      for (const Candidate& candidate : looks[p].gathered)
        if (candidate.bits > chosen) pieces[p].mask[candidate.at] = 1;
    keep_ties(pieces, looks, chosen, ties_kept);
  }
  return {std::bit_cast<float>(chosen), ties_kept, kept - ties_wanted + ties_kept};
}

}  // namespace vpns
