// The rows of depthwise layers in the dispatch table, and how their weights are laid out.
#include "cpu/depthwise.h"

#include <memory>

#include "arithmetic.h"
#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

constexpr int64_t kVector = 16;

DepthwisePlan make_plan(const ConvShape& s, const SparseWeights& w) {
  const int64_t taps = s.R * s.S, vectors = ceil_div(s.C, kVector);
  DepthwisePlan plan{s, vectors, {}, {}, {}, w.indptr[s.C] == taps * s.C};
  plan.weights.assign(taps * vectors * kVector, 0.0f);
  plan.kept.assign(taps * vectors * kVector, 0);
  for (int64_t c = 0; c < s.C; ++c)
    for (int32_t i = w.indptr[c]; i < w.indptr[c + 1]; ++i) {
      const int64_t at = w.index[i] * vectors * kVector + c;
      plan.weights[at] = weight_at(w, i);
      plan.kept[at] = -1;
    }
  for (int64_t i = 0; i < taps * vectors; ++i) {
    const int64_t lanes = std::min(kVector, s.C - i % vectors * kVector);
    int64_t count = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) count -= plan.kept[i * kVector + lane];
    plan.kinds.push_back(count == 0       ? DepthwisePlan::Kept::kNone
                         : count == lanes ? DepthwisePlan::Kept::kAll
                                          : DepthwisePlan::Kept::kSome);
  }
  return plan;
}

using Run = void (*)(const DepthwisePlan&, const ConvCall&);

template <Run kRun>
class PreparedDepthwise final : public PreparedConv {
 public:
  PreparedDepthwise(const ConvShape& s, const SparseWeights& weights) : plan_(make_plan(s, weights)) {}

  void run(const ConvCall& call) const override { kRun(plan_, call); }
  bool takes_any_batch() const override { return true; }
  bool takes_any_rows() const override { return true; }

 private:
  DepthwisePlan plan_;
};

std::string why_not(const ConvShape& s, const SparseWeights& weights, DType x_dtype) {
  if (s.groups != s.C || s.groups != s.K) return "it takes depthwise layers";
  if (weights.format == Format::kChannel || weights.bk * weights.bc != 1) return "it takes unstructured weights";
  if (weights.dtype == DType::kF64 || x_dtype == DType::kF64) return "it computes in float32";
  return {};
}

template <Run kRun>
SparseConvKernel row(const char* name, Isa isa) {
  return {name, isa, false, why_not, [](const ConvShape& s, const SparseWeights& w) -> std::unique_ptr<PreparedConv> {
            return std::make_unique<PreparedDepthwise<kRun>>(s, w);
          }};
}

#if defined(VPNS_WITH_AVX512)
void run_on_avx512(const DepthwisePlan& plan, const ConvCall& call) {
#if defined(VPNS_WITH_AVX512_BF16)
  if (isa_usable(Isa::kAvx512Bf16)) return run_depthwise_avx512_bf16(plan, call);
#endif
  run_depthwise_avx512(plan, call);
}
#endif

}  // namespace

void add_depthwise_kernels([[maybe_unused]] std::vector<SparseConvKernel>& table) {
#if defined(VPNS_WITH_AVX512)
  table.push_back(row<run_on_avx512>("depthwise_avx512", Isa::kAvx512));
#endif
#if defined(VPNS_WITH_AVX2)
  table.push_back(row<run_depthwise_avx2>("depthwise_avx2", Isa::kAvx2));
#endif
}

}  // namespace vpns
