// Which scores are among the k largest by magnitude?
#pragma once

#include <cstdint>
#include <vector>

namespace vpns {

struct Threshold {
  float value;        // the k-th largest magnitude; NaN where a score is NaN, and then the rest means nothing
  int64_t ties_kept;  // how many entries equal to it are kept
  int64_t kept;       // entries in all: k, unless ties go
};

// With masks, masks[i][j] = 1 where |data[i][j]| > value, and for the first `ties_kept` that equal it; else 0.
// `all_ties_or_none`: where not all that equal it are among the k, none is kept.
Threshold select_threshold(const std::vector<const float*>& data, const std::vector<int64_t>& counts, int64_t kept,
                           int threads, const std::vector<uint8_t*>& masks = {}, bool all_ties_or_none = false);

}  // namespace vpns
