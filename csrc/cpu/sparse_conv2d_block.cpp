// Prepares block-sparse weights for the float32 kernels: block offsets, weights with output channels innermost.
#include "cpu/sparse_conv2d_block.h"

#include <algorithm>
#include <memory>

#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

BlockPlan make_plan(const ConvShape& s, const SparseWeights& weights, int lanes) {
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups, taps = s.R * s.S;
  // A stem has fewer channels than a block; the rest of its blocks would be zeros.
  const int64_t bc = std::min(weights.bc, channels);
  const int64_t group_channels = ceil_div(channels, bc) * bc;
  const int64_t pixel_bytes = s.groups * group_channels * 4;
  int64_t tile_p = s.P, tile_q = s.Q;
  const auto bytes = [&] { return Planes(s, tile_p, tile_q).pixels() * pixel_bytes; };
  while (tile_p > 1 && bytes() > kBlockPlaneBytes) tile_p = even_tile(s.P, tile_p - 1);
  while (tile_q > 16 && bytes() > kBlockPlaneBytes) tile_q = even_tile(s.Q, tile_q - 1);
  const bool one_by_one = taps == 1 && s.pad_h == 0 && s.pad_w == 0 && group_channels == channels;
  BlockPlan plan{s, Planes(s, tile_p, tile_q), weights.bk, bc, ceil_div(weights.bk, lanes) * lanes,
                 group_channels, one_by_one, {}, {}, {}};
  const int64_t rows_per_group = ceil_div(filters, weights.bk), rows = s.groups * rows_per_group;
  plan.weights.assign(weights.count * plan.bc * plan.padded_bk, 0.0f);
  for (int64_t row = 0; row < rows; ++row) {
    plan.starts.push_back(weights.indptr[row]);
    for (int64_t i = weights.indptr[row]; i < weights.indptr[row + 1]; ++i) {
      const int64_t flat = weights.index[i], block_c = flat / taps, r = flat % taps / s.S, col = flat % s.S;
      plan.offsets.push_back(plan.planes.tap(r, col) * s.groups * group_channels +
                             row / rows_per_group * group_channels + block_c * plan.bc);
      for (int64_t k = 0; k < plan.bk; ++k)
        for (int64_t c = 0; c < plan.bc; ++c)
          plan.weights[(i * plan.bc + c) * plan.padded_bk + k] = weight_at(weights, (i * plan.bk + k) * weights.bc + c);
    }
  }
  plan.starts.push_back(weights.count);
  return plan;
}

template <int kLanes, RunBlock kRun>
class PreparedBlock final : public PreparedConv {
 public:
  PreparedBlock(const ConvShape& s, const SparseWeights& weights) : plan_(make_plan(s, weights, kLanes)) {}

  void run(const ConvCall& call) const override { kRun(plan_, call); }

 private:
  BlockPlan plan_;
};

template <int kLanes, RunBlock kRun>
std::unique_ptr<PreparedConv> prepare(const ConvShape& s, const SparseWeights& weights) {
  return std::make_unique<PreparedBlock<kLanes, kRun>>(s, weights);
}

std::string why_not(const ConvShape&, const SparseWeights& weights, DType x_dtype) {
  if (weights.format != Format::kBlock) return "it takes block weights";
  if (weights.dtype == DType::kF64 || x_dtype == DType::kF64) return "it computes in float32";
  return {};
}

}  // namespace

void add_block_kernels(std::vector<SparseConvKernel>& table) {
#if defined(VPNS_WITH_AVX512)
  table.push_back({"block_avx512", Isa::kAvx512, false, why_not, prepare<16, run_block_avx512>});
#endif
#if defined(VPNS_WITH_AVX2)
  table.push_back({"block_avx2", Isa::kAvx2, false, why_not, prepare<8, run_block_avx2>});
  table.push_back({"block_avx512_emulated", Isa::kAvx2, true, why_not, prepare<16, run_block_avx512_emulated>});
#endif
}

}  // namespace vpns
