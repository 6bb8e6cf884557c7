// The rows of the block family in the dispatch table: block and channel weights, in float32 and in bf16.
#include "cpu/sparse_conv2d_block.h"

#include <memory>

#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

template <int kLanes, bool kPairs, RunBlock kRun>
class PreparedBlock final : public PreparedConv {
 public:
  PreparedBlock(const ConvShape& s, const SparseWeights& weights)
      : plan_(make_block_plan(s, weights, kLanes, kPairs)) {}

  void run(const ConvCall& call) const override { kRun(plan_, call); }
  bool takes_any_batch() const override { return true; }
  bool takes_any_rows() const override { return true; }

 private:
  BlockPlan plan_;
};

template <int kLanes, bool kPairs, RunBlock kRun>
std::unique_ptr<PreparedConv> prepare(const ConvShape& s, const SparseWeights& weights) {
  return std::make_unique<PreparedBlock<kLanes, kPairs, kRun>>(s, weights);
}

template <Format kFormat>
std::string why_not(const ConvShape&, const SparseWeights& weights, DType x_dtype) {
  if (weights.format != kFormat)
    return kFormat == Format::kBlock ? "it takes block weights" : "it takes channel weights";
  if (weights.dtype == DType::kF64 || x_dtype == DType::kF64) return "it computes in float32";
  return {};
}

template <Format kFormat>
std::string why_not_pairs(const ConvShape& s, const SparseWeights& weights, DType x_dtype) {
  if (std::string reason = why_not<kFormat>(s, weights, x_dtype); !reason.empty()) return reason;
  if (weights.dtype != DType::kBF16 || x_dtype != DType::kBF16) return "it takes bf16 inputs and weights";
  if (kFormat == Format::kBlock && weights.bc == 1 && s.C > s.groups) return "it takes pairs of input channels";
  return {};
}

template <Format kFormat, int kLanes, RunBlock kRun>
SparseConvKernel row(const char* name, Isa isa, bool emulated) {
  return {name, isa, emulated, why_not<kFormat>, prepare<kLanes, false, kRun>};
}

template <Format kFormat, RunBlock kRun>
SparseConvKernel row_of_pairs(const char* name, Isa isa, bool emulated) {
  return {name, isa, emulated, why_not_pairs<kFormat>, prepare<16, true, kRun>};
}

template <Format kFormat>
void add_rows(std::vector<SparseConvKernel>& table, [[maybe_unused]] const char* const (&names)[5]) {
#if defined(VPNS_WITH_AVX512_BF16)
  table.push_back(row_of_pairs<kFormat, run_block_avx512_bf16>(names[0], Isa::kAvx512Bf16, false));
#endif
#if defined(VPNS_WITH_AVX512)
  table.push_back(row<kFormat, 16, run_block_avx512>(names[1], Isa::kAvx512, false));
#endif
#if defined(VPNS_WITH_AVX2)
  table.push_back(row<kFormat, 8, run_block_avx2>(names[2], Isa::kAvx2, false));
  table.push_back(row<kFormat, 16, run_block_avx512_emulated>(names[3], Isa::kAvx2, true));
  table.push_back(row_of_pairs<kFormat, run_block_avx512_bf16_emulated>(names[4], Isa::kAvx2, true));
#endif
}

}  // namespace

void add_block_kernels(std::vector<SparseConvKernel>& table) {
  add_rows<Format::kBlock>(table, {"block_avx512_bf16", "block_avx512", "block_avx2", "block_avx512_emulated",
                                   "block_avx512_bf16_emulated"});
  add_rows<Format::kChannel>(table, {"channel_avx512_bf16", "channel_avx512", "channel_avx2",
                                     "channel_avx512_emulated", "channel_avx512_bf16_emulated"});
}

}  // namespace vpns
