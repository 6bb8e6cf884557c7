// Kept weights with input and output channels exchanged, as the input gradient's convolutions take them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/input_gradient.h"
#include "params.h"

namespace vpns {

// The layout of those weights that stand at some of the filter's taps; made once for any values.
class TransposedWeights {
 public:
  // The taps in the order that the transposed filter has them: falling.
  TransposedWeights(const ConvShape&, const SparseWeights&, const std::vector<int64_t>& taps_h,
                    const std::vector<int64_t>& taps_w);

  // Gives `to` the transposed values and a view of them in the portable order, which holds while this lives too.
  void fill(const SparseWeights& forward, OwnedWeights& to, int threads) const;

 private:
  void list_entries(const ConvShape&, const SparseWeights&, const std::vector<int64_t>& taps_h,
                    const std::vector<int64_t>& taps_w);
  void list_channels(const ConvShape&, const SparseWeights&, const std::vector<int64_t>& taps_h,
                     const std::vector<int64_t>& taps_w);

  Format format_;
  int64_t bk_, bc_;  // of the forward weights
  int64_t count_;    // of values, in units of a block
  std::vector<int32_t> indptr_, index_;
  std::vector<int32_t> from_;  // by entry (of channel weights, by value), which forward one it is; empty: all are zero
};

}  // namespace vpns
