// The exact k-th largest magnitude of a list of float tensors.
//
// The magnitude of a float orders like its bits without the sign. One pass over the scores counts how many fall into each
// of 2^12 ranges of those bits; the range that holds the k-th is gathered in a second pass and selected exactly. Both
// passes are parallel; counts are integers, so the result does not depend on the number of threads. A third pass writes
// the masks that follow.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/kernels.h"

namespace vpns {
namespace {

constexpr int kBins = 1 << 12;
constexpr int kShift = 31 - 12;
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr int64_t kPiece = 1 << 18;
// Neighbouring scores often share a range; separate counters keep the additions from waiting for each other.
constexpr int kCopies = 4;

uint32_t magnitude_bits(float value) { return std::bit_cast<uint32_t>(value) & 0x7fffffffu; }

struct Piece {
  const float* data;
  int64_t count;
};

std::vector<Piece> split(const std::vector<const float*>& data, const std::vector<int64_t>& counts) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < data.size(); ++i)
    for (int64_t begin = 0; begin < counts[i]; begin += kPiece)
      pieces.push_back({data[i] + begin, std::min(kPiece, counts[i] - begin)});
  return pieces;
}

}  // namespace

Threshold select_threshold(const std::vector<const float*>& data, const std::vector<int64_t>& counts, int64_t kept,
                           int threads) {
  const std::vector<Piece> pieces = split(data, counts);
  const int64_t piece_count = static_cast<int64_t>(pieces.size());
  std::vector<int64_t> histogram(kBins, 0);
  bool has_nan = false;
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> local(kCopies * kBins);
    bool nan = false;
    std::vector<int64_t> sum(kBins, 0);
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < piece_count; ++p) {
      std::fill(local.begin(), local.end(), 0u);
      const Piece piece = pieces[p];
      uint32_t largest = 0;
      int64_t i = 0;
      for (; i + kCopies <= piece.count; i += kCopies) {
        for (int copy = 0; copy < kCopies; ++copy) {
          const uint32_t bits = magnitude_bits(piece.data[i + copy]);
          largest = std::max(largest, bits);
          ++local[copy * kBins + (bits >> kShift)];
        }
      }
      for (; i < piece.count; ++i) {
        const uint32_t bits = magnitude_bits(piece.data[i]);
        largest = std::max(largest, bits);
        ++local[bits >> kShift];
      }
      nan = nan || largest > kInfinityBits;
      for (int copy = 0; copy < kCopies; ++copy)
        for (int bin = 0; bin < kBins; ++bin) sum[bin] += local[copy * kBins + bin];
    }
#pragma omp critical
    {
      for (int bin = 0; bin < kBins; ++bin) histogram[bin] += sum[bin];
      has_nan = has_nan || nan;
    }
  }
  if (has_nan) return {std::numeric_limits<float>::quiet_NaN(), 0};

  int bin = kBins - 1;
  int64_t above = 0;
  while (above + histogram[bin] < kept) above += histogram[bin--];

  std::vector<uint32_t> candidates;
  candidates.reserve(histogram[bin]);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> local;
#pragma omp for schedule(dynamic) nowait
    for (int64_t p = 0; p < piece_count; ++p)
      for (int64_t i = 0; i < pieces[p].count; ++i) {
        const uint32_t bits = magnitude_bits(pieces[p].data[i]);
        if (static_cast<int>(bits >> kShift) == bin) local.push_back(bits);
      }
#pragma omp critical
    candidates.insert(candidates.end(), local.begin(), local.end());
  }
  const int64_t rank = kept - above - 1;
  std::nth_element(candidates.begin(), candidates.begin() + rank, candidates.end(), std::greater<uint32_t>());
  const uint32_t chosen = candidates[rank];
  const int64_t larger = std::count_if(candidates.begin(), candidates.end(), [chosen](uint32_t b) { return b > chosen; });
  return {std::bit_cast<float>(chosen), kept - above - larger};
}

Kept take_kept(const std::vector<const float*>& data, const std::vector<int64_t>& counts,
               const std::vector<uint8_t*>& masks, float threshold, int64_t ties_kept, int threads) {
  const std::vector<Piece> pieces = split(data, counts);
  std::vector<uint8_t*> targets;
  for (size_t i = 0; i < data.size(); ++i)
    for (int64_t begin = 0; begin < counts[i]; begin += kPiece) targets.push_back(masks[i] + begin);
  const int64_t piece_count = static_cast<int64_t>(pieces.size());
  const int32_t limit = std::bit_cast<int32_t>(threshold);
  std::vector<int64_t> ties(pieces.size());
  int64_t kept = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : kept)
  for (int64_t p = 0; p < piece_count; ++p) {
    int32_t larger = 0, equal = 0;
    for (int64_t i = 0; i < pieces[p].count; ++i) {
      // Of magnitudes, signed and unsigned bits order alike; signed ones compare faster.
      const int32_t bits = static_cast<int32_t>(magnitude_bits(pieces[p].data[i]));
      targets[p][i] = bits > limit;
      larger += bits > limit;
      equal += bits == limit;
    }
    kept += larger;
    ties[p] = equal;
  }
  Kept found{kept, 0};
  for (int64_t p = 0; p < piece_count; ++p) {
    found.ties += ties[p];
    for (int64_t i = 0; ties[p] > 0 && ties_kept > 0; ++i)
      if (static_cast<int32_t>(magnitude_bits(pieces[p].data[i])) == limit) {
        targets[p][i] = 1;
        --ties[p];
        --ties_kept;
        ++found.kept;
      }
  }
  return found;
}

}  // namespace vpns
