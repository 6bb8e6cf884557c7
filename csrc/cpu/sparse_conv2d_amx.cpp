// Prepares block and channel weights in bf16 for the AMX kernel: tile order of the weights, block offsets.
#include "cpu/sparse_conv2d_amx.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "arithmetic.h"
#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

AmxPlan plan_blocks(const ConvShape& s, const SparseWeights& weights, bool images_in_lanes) {
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups, taps = s.R * s.S;
  const int64_t group_channels = round_up(channels, weights.bc);
  const int64_t lanes = images_in_lanes ? kTileRows : 1, pixel_bytes = s.groups * group_channels * 2 * lanes;
  int64_t tile_p = s.P, tile_q = s.Q;
  const auto bytes = [&] { return Planes(s, tile_p, tile_q).pixels() * pixel_bytes; };
  while (tile_p > 1 && bytes() > kAmxPlaneBytes) tile_p = even_tile(s.P, tile_p - 1);
  while (tile_q > 8 && bytes() > kAmxPlaneBytes) tile_q = even_tile(s.Q, tile_q - 1);
  AmxPlan plan{s, images_in_lanes, Planes(s, tile_p, tile_q), weights.bk, weights.bc, weights.bc % 32 ? 16 : 32,
               group_channels, {}, {}, {}, s.K, s.C, {}, {}, {}, {}};
  const int64_t rows_per_group = ceil_div(filters, weights.bk), rows = s.groups * rows_per_group;
  const uint16_t* values = static_cast<const uint16_t*>(weights.values);
  plan.weights.reserve(weights.count * plan.bk * plan.bc);
  for (int64_t row = 0; row < rows; ++row) {
    plan.starts.push_back(weights.indptr[row]);
    plan.first_span.push_back(static_cast<int64_t>(plan.spans.size()));
    const int64_t in_group = row % rows_per_group * plan.bk, wanted = std::min(plan.bk, filters - in_group);
    for (int64_t k = 0; k < wanted; k += 32) {
      const int64_t count = std::min<int64_t>(wanted - k, 32);
      plan.spans.push_back({row / rows_per_group * filters + in_group + k, count, count, 0});
    }
    for (int64_t i = weights.indptr[row]; i < weights.indptr[row + 1]; ++i) {
      const int64_t flat = weights.index[i], block_c = flat / taps, r = flat % taps / s.S, col = flat % s.S;
      plan.offsets.push_back(plan.planes.tap(r, col) * lanes * s.groups * group_channels +
                             row / rows_per_group * group_channels + block_c * plan.bc);
      for (int64_t k0 = 0; k0 < plan.bk; k0 += 16)
        for (int64_t c0 = 0; c0 < plan.bc; c0 += 2)
          for (int64_t k = k0; k < k0 + 16; ++k)
            for (int64_t c = c0; c < c0 + 2; ++c) plan.weights.push_back(values[(i * plan.bk + k) * plan.bc + c]);
    }
  }
  plan.starts.push_back(weights.count);
  plan.first_span.push_back(static_cast<int64_t>(plan.spans.size()));
  return plan;
}

// Blocks of the kept channels, all of them there.
AmxPlan plan_channels(const ConvShape& s, const SparseWeights& weights, bool images_in_lanes) {
  const int64_t taps = s.R * s.S, columns = weights.columns;
  const int64_t bk = weights.count > 16 ? 32 : 16, bc = columns > 16 ? 32 : 16;
  ConvShape kept = s;
  kept.K = std::max<int64_t>(weights.count, 1);
  kept.C = std::max<int64_t>(columns, 1);
  const int64_t rows = ceil_div(kept.K, bk), row_blocks = weights.count > 0 ? ceil_div(columns, bc) * taps : 0;
  std::vector<uint16_t> values(rows * row_blocks * bk * bc, 0);
  for (int64_t k = 0; k < weights.count; ++k)
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t block = k / bk * row_blocks + c / bc * taps + tap;
        values[(block * bk + k % bk) * bc + c % bc] =
            static_cast<const uint16_t*>(weights.values)[(k * columns + c) * taps + tap];
      }
  std::vector<int32_t> indptr, index;
  for (int64_t row = 0; row <= rows; ++row) indptr.push_back(static_cast<int32_t>(row * row_blocks));
  for (int64_t i = 0; i < rows * row_blocks; ++i) index.push_back(static_cast<int32_t>(i % row_blocks));
  AmxPlan plan = plan_blocks(kept,
                             {Format::kBlock, DType::kBF16, values.data(), indptr.data(), index.data(),
                              rows * row_blocks, bk, bc},
                             images_in_lanes);
  plan.inputs = s.C;
  plan.outputs = s.K;
  plan.gather = kept_inputs(s, weights);
  plan.spans = kept_outputs(s, weights, std::vector<int64_t>(rows, bk), plan.keeps);
  return plan;
}

AmxPlan make_plan(const ConvShape& s, const SparseWeights& weights, bool images_in_lanes) {
  return weights.format == Format::kBlock ? plan_blocks(s, weights, images_in_lanes)
                                          : plan_channels(s, weights, images_in_lanes);
}

template <RunAmx kRun>
class PreparedAmx final : public PreparedConv {
 public:
  PreparedAmx(const ConvShape& s, const SparseWeights& weights) : images_(s.N) {
    if (s.N >= kTileRows) by_image_.emplace(make_plan(s, weights, true));
    if (s.N % kTileRows != 0) by_pixel_.emplace(make_plan(s, weights, false));
  }

  void run(const ConvCall& call) const override {
    const int64_t whole = images_ / kTileRows * kTileRows;
    if (by_image_) kRun(*by_image_, call, 0, whole);
    if (by_pixel_) kRun(*by_pixel_, call, whole, images_ - whole);
  }
  bool takes_any_rows() const override { return true; }

 private:
  int64_t images_;
  std::optional<AmxPlan> by_image_;  // whole groups of 16 images
  std::optional<AmxPlan> by_pixel_;  // the images left over
};

template <RunAmx kRun>
std::unique_ptr<PreparedConv> prepare(const ConvShape& s, const SparseWeights& weights) {
  return std::make_unique<PreparedAmx<kRun>>(s, weights);
}

template <Format kFormat>
std::string why_not(const ConvShape&, const SparseWeights& weights, DType x_dtype) {
  if (weights.format != kFormat)
    return kFormat == Format::kBlock ? "it takes block weights" : "it takes channel weights";
  if (weights.dtype != DType::kBF16 || x_dtype != DType::kBF16) return "it takes bf16 inputs and weights";
  if (kFormat == Format::kBlock && (weights.bk % 16 != 0 || weights.bc % 16 != 0))
    return "it takes blocks of a multiple of 16 channels";
  return {};
}

}  // namespace

void add_amx_kernels(std::vector<SparseConvKernel>& table) {
#if defined(VPNS_WITH_AMX)
  table.push_back({"block_amx", Isa::kAmx, false, why_not<Format::kBlock>, prepare<run_amx>});
  table.push_back({"channel_amx", Isa::kAmx, false, why_not<Format::kChannel>, prepare<run_amx>});
#endif
#if defined(VPNS_WITH_AVX2)
  table.push_back({"block_amx_emulated", Isa::kAvx2, true, why_not<Format::kBlock>, prepare<run_amx_emulated>});
  table.push_back({"channel_amx_emulated", Isa::kAvx2, true, why_not<Format::kChannel>, prepare<run_amx_emulated>});
#endif
}

}  // namespace vpns
