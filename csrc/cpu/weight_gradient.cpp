#include "cpu/weight_gradient.h"

#include <algorithm>

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/planes.h"

namespace vpns {
namespace {

// Laid-out input and gradient of a tile stay within this many bytes, so that they are read from the second-level cache.
constexpr int64_t kTileBytes = 512 * 1024;

BlockGradPlan make_plan(const ConvShape& s, const SparseWeights& w, int64_t lanes) {
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups, taps = s.R * s.S;
  const std::vector<int32_t> none(s.groups * ceil_div(filters, w.bk) + 1, 0);
  SparseWeights empty = w;
  empty.indptr = none.data();
  empty.count = 0;
  BlockGradPlan plan{make_block_plan(s, empty, lanes, false), w.bk, w.bc, ceil_div(w.bk, lanes) * lanes, 0, 1, {}};
  const BlockPlan& reader = plan.reader;
  const int64_t rows_per_group = ceil_div(filters, w.bk), pixel = s.groups * reader.group_cells;
  plan.padded_filters = s.groups * rows_per_group * plan.padded_bk;
  if (reader.tile_p >= s.P && reader.tile_q >= s.Q) {
    const int64_t image_bytes = 4 * (reader.rows * reader.cols * pixel + s.P * s.Q * plan.padded_filters);
    plan.images = std::clamp<int64_t>(kTileBytes / image_bytes, 1, std::max<int64_t>(s.N, 1));
  }
  plan.blocks.reserve(w.count);
  for (int64_t row = 0; row < s.groups * rows_per_group; ++row)
    for (int32_t i = w.indptr[row]; i < w.indptr[row + 1]; ++i) {
      const int64_t tap = w.index[i] % taps, c = w.index[i] / taps * w.bc;
      const int64_t at = tap / s.S * reader.h.distance * reader.cols + tap % s.S * reader.w.distance;
      plan.blocks.push_back({at * pixel + row / rows_per_group * reader.group_cells + c, row * plan.padded_bk,
                             std::min(w.bc, channels - c)});
    }
  return plan;
}

class PreparedBlockGrad final : public PreparedWeightGrad {
 public:
  PreparedBlockGrad(const ConvShape& s, const SparseWeights& w, int64_t lanes, RunBlockGrad run)
      : plan_(make_plan(s, w, lanes)), run_(run) {}
  void run(const WeightGradCall& call) const override { run_(plan_, call); }

 private:
  BlockGradPlan plan_;
  RunBlockGrad run_;
};

}  // namespace

std::unique_ptr<PreparedWeightGrad> prepare_weight_gradient(const ConvShape& s, const SparseWeights& layout) {
  check(layout.format == Format::kBlock, "weight_gradient", "block weights", static_cast<int>(layout.format));
#if defined(VPNS_WITH_AVX512)
  if (isa_usable(Isa::kAvx512)) return std::make_unique<PreparedBlockGrad>(s, layout, 16, run_block_grad_avx512);
#endif
#if defined(VPNS_WITH_AVX2)
  if (isa_usable(Isa::kAvx2)) return std::make_unique<PreparedBlockGrad>(s, layout, 8, run_block_grad_avx2);
#endif
  fail("weight_gradient", "a CPU with AVX2", "none, or a cap below it");
}

}  // namespace vpns
