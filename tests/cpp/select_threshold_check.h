// Does the selection find what a sort finds?
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "chance.h"
#include "cpu/select_threshold.h"

// Tensors of any length with ties, infinities and (rarely) NaN.
inline bool select_threshold_is_right() {
  const bool nan = one_in(4), ties = one_in(2);
  std::vector<std::vector<float>> tensors;
  std::vector<float> sorted;
  for (int64_t i = pick({1, 2, 5}); i > 0; --i) {
    tensors.emplace_back();
    for (int64_t n = one_in(25) ? 150001 : pick({0, 1, 3, 4, 100, 4097}); n > 0; --n) {
      const float drawn = static_cast<float>(uniform());
      const float value = one_in(5) ? std::copysign(std::numeric_limits<float>::infinity(), drawn) : drawn;
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
  const bool all_or_none = one_in(2);
  std::vector<std::vector<uint8_t>> masks;
  std::vector<uint8_t*> targets;
  for (const auto& tensor : tensors) masks.emplace_back(tensor.size(), uint8_t{7});
  for (auto& mask : masks) targets.push_back(mask.data());
  if (one_in(3)) targets.clear();
  const vpns::Threshold found =
      vpns::select_threshold(data, counts, kept, static_cast<int>(pick({1, 2, 3})), targets, all_or_none);
  if (nan) return std::isnan(found.value);
  std::sort(sorted.begin(), sorted.end(), std::greater<float>());
  const float expected = sorted[kept - 1];
  const int64_t larger =
      std::lower_bound(sorted.begin(), sorted.end(), expected, std::greater<float>()) - sorted.begin();
  const int64_t equal = std::count(sorted.begin(), sorted.end(), expected);
  int64_t stay = all_or_none && kept - larger < equal ? 0 : kept - larger;
  if (found.value != expected || found.ties_kept != stay || found.kept != larger + stay) return false;
  for (size_t t = 0; t < targets.size(); ++t)
    for (size_t i = 0; i < tensors[t].size(); ++i) {
      const float magnitude = std::abs(tensors[t][i]);
      const bool wanted = magnitude > expected || (magnitude == expected && stay-- > 0);
      if (masks[t][i] != (wanted ? 1 : 0)) return false;
    }
  return true;
}
