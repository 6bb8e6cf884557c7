// The rows of narrow groups in the dispatch table, and how their weights are laid out.
#include "cpu/grouped.h"

#include <bit>
#include <memory>

#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

// The float of a weight, or where pairs count those of two neighbouring input channels as a word.
template <bool kPairs>
GroupedPlan make_plan(const ConvShape& s, const SparseWeights& w) {
  constexpr int64_t kChannels = kPairs ? 2 : 1;
  const int64_t width = s.C / s.groups, taps = s.R * s.S, steps = width / kChannels, blocks = width / w.bc;
  GroupedPlan plan{s, std::vector<float>(taps * steps * s.K)};
  const auto weight = [&](int64_t k, int64_t c, int64_t tap) {
    // Blocks [bk][bc] of a row of blocks lie in the order of (block of input channels, tap).
    const int64_t row = k / w.bk, block = row * blocks * taps + c / w.bc * taps + tap;
    return weight_at(w, (block * w.bk + k % w.bk) * w.bc + c % w.bc);
  };
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t k = 0; k < s.K; ++k) {
        float& to = plan.weights[(tap * steps + step) * s.K + k];
        if constexpr (kPairs) {
          const uint32_t low = std::bit_cast<uint32_t>(weight(k, 2 * step, tap)) >> 16;
          to = std::bit_cast<float>(low | std::bit_cast<uint32_t>(weight(k, 2 * step + 1, tap)));
        } else {
          to = weight(k, step, tap);
        }
      }
  return plan;
}

using Run = void (*)(const GroupedPlan&, const ConvCall&);

template <Run kRun, bool kPairs>
class PreparedGrouped final : public PreparedConv {
 public:
  PreparedGrouped(const ConvShape& s, const SparseWeights& weights) : plan_(make_plan<kPairs>(s, weights)) {}

  void run(const ConvCall& call) const override { kRun(plan_, call); }
  bool takes_any_batch() const override { return true; }
  bool takes_any_rows() const override { return true; }

 private:
  GroupedPlan plan_;
};

template <bool kPairs>
std::string why_not(const ConvShape& s, const SparseWeights& w, DType x_dtype) {
  const int64_t width = s.C / s.groups;
  if (w.format != Format::kBlock || s.groups == 1) return "it takes groups as blocks";
  if (s.K != s.C || (width != 4 && width != 8) || s.C % 16 != 0)
    return "it takes groups of 4 or 8 channels that make as many";
  if (s.R != 3 || s.S != 3 || s.stride_h != s.stride_w || s.stride_h > 2 || s.dilation_h != 1 || s.dilation_w != 1)
    return "it takes 3x3 filters of stride 1 or 2";
  if (width % w.bc != 0 || w.count * w.bk * w.bc != s.K * width * s.R * s.S)
    return "it takes weights of which none is pruned";
  if (w.dtype == DType::kF64 || x_dtype == DType::kF64) return "it computes in float32";
  if (kPairs && (w.dtype != DType::kBF16 || x_dtype != DType::kBF16)) return "it takes bf16 inputs and weights";
  return {};
}

template <Run kRun, bool kPairs>
SparseConvKernel row(const char* name, Isa isa) {
  return {name, isa, false, why_not<kPairs>,
          [](const ConvShape& s, const SparseWeights& w) -> std::unique_ptr<PreparedConv> {
            return std::make_unique<PreparedGrouped<kRun, kPairs>>(s, w);
          }};
}

}  // namespace

void add_grouped_kernels([[maybe_unused]] std::vector<SparseConvKernel>& table) {
#if defined(VPNS_WITH_AVX512_BF16)
  table.push_back(row<run_grouped_avx512_bf16, true>("grouped_avx512_bf16", Isa::kAvx512Bf16));
#endif
#if defined(VPNS_WITH_AVX512)
  table.push_back(row<run_grouped_avx512, false>("grouped_avx512", Isa::kAvx512));
#endif
#if defined(VPNS_WITH_AVX2)
  table.push_back(row<run_grouped_avx2, false>("grouped_avx2", Isa::kAvx2));
#endif
}

}  // namespace vpns
