// The index-driven kernels of unstructured weights as rows of the dispatch table.
#include "cpu/sparse_conv2d_unstructured.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

constexpr UnstructuredVectors kAvx2{8, 4, kMaxSegmentAvx2, kMaxChunkWeights, false};
constexpr UnstructuredVectors kAvx512{16, 4, kMaxSegmentAvx512, kMaxChunkWeights, false};
constexpr UnstructuredVectors kAvx512Fp16{32, 2, kMaxSegmentAvx512, kMaxChunkWeightsFp16, false};
constexpr float kLargestFp16 = 65504.0f;

using Parts = std::shared_ptr<const std::vector<UnstructuredPart>>;

// The layout in the kernel's order, shared with those of other values, and the values in that order.
class PreparedUnstructured final : public PreparedConv {
 public:
  PreparedUnstructured(Parts parts, const SparseWeights& weights, RunUnstructured run, int threads)
      : parts_(std::move(parts)), run_(run) {
    for (const UnstructuredPart& part : *parts_) {
      const int32_t* const from = part.plan.from.data();
      const int64_t count = static_cast<int64_t>(part.plan.from.size());
      float* const to = weights_.emplace_back(std::make_unique_for_overwrite<float[]>(count)).get();
#pragma omp parallel for num_threads(threads) if (threads > 1 && count > kLeastSharedValues)
      for (int64_t i = 0; i < count; ++i) to[i] = weight_at(weights, from[i]);
    }
  }

  void run(const ConvCall& call) const override {
    for (size_t i = 0; i < parts_->size(); ++i) run_((*parts_)[i], weights_[i].get(), call);
  }

  bool suits_any_threads() const override { return false; }

  std::unique_ptr<PreparedConv> refilled(const SparseWeights& weights, int threads) const override {
    return std::make_unique<PreparedUnstructured>(parts_, weights, run_, threads);
  }

 private:
  Parts parts_;
  std::vector<std::unique_ptr<float[]>> weights_;
  RunUnstructured run_;
};

template <const UnstructuredVectors& kVectors, RunUnstructured kRun>
std::unique_ptr<PreparedConv> prepare(const ConvShape& s, const SparseWeights& weights) {
  auto parts = std::make_shared<const std::vector<UnstructuredPart>>(make_unstructured_parts(s, weights, kVectors));
  return std::make_unique<PreparedUnstructured>(std::move(parts), weights, kRun, weights.threads);
}

std::string why_not(const ConvShape& s, const SparseWeights& weights, DType x_dtype) {
  if (weights.format != Format::kUnstructured) return "it takes unstructured weights";
  if (weights.dtype == DType::kF64 || x_dtype == DType::kF64) return "it computes in float32";
  // The smallest tile is one segment.
  const Planes planes(s, std::min<int64_t>(s.P, kMaxSegmentRows), std::min<int64_t>(s.Q, kMaxSegmentAvx512));
  if (s.C / s.groups * (planes.pixels() + 2) * 32 > INT32_MAX)
    return "a tile of the input is too large for 32-bit offsets";
  return {};
}

std::string why_not_fp16(const ConvShape& s, const SparseWeights& weights, DType x_dtype) {
  if (std::string reason = why_not(s, weights, x_dtype); !reason.empty()) return reason;
  if (x_dtype != DType::kBF16 && x_dtype != DType::kF16) return "it sums in float16: float16 and bfloat16 inputs only";
  if (s.R * s.S > kMaxChunkWeightsFp16) return "its float16 sums take filters of at most 64 taps";
  for (int64_t i = 0; weights.values != nullptr && i < weights.count; ++i)
    if (!(std::abs(weight_at(weights, i)) <= kLargestFp16)) return "a weight is beyond the range of float16";
  return {};
}

}  // namespace

void add_unstructured_kernels(std::vector<SparseConvKernel>& table) {
#if defined(VPNS_WITH_AVX512_FP16)
  // Only by name, as the emulated ones: inputs beyond half precision's range would go unnoticed.
  table.push_back({"unstructured_avx512_fp16", Isa::kAvx512Fp16, true, why_not_fp16,
                   prepare<kAvx512Fp16, run_unstructured_avx512_fp16>});
#endif
#if defined(VPNS_WITH_AVX512)
  table.push_back({"unstructured_avx512", Isa::kAvx512, false, why_not, prepare<kAvx512, run_unstructured_avx512>});
#endif
#if defined(VPNS_WITH_AVX2)
  table.push_back({"unstructured_avx2", Isa::kAvx2, false, why_not, prepare<kAvx2, run_unstructured_avx2>});
  table.push_back({"unstructured_avx512_emulated", Isa::kAvx2, true, why_not,
                   prepare<kAvx512, run_unstructured_avx512_emulated>});
  table.push_back({"unstructured_avx512_fp16_emulated", Isa::kAvx2, true, why_not_fp16,
                   prepare<kAvx512Fp16, run_unstructured_avx512_fp16_emulated>});
#endif
}

}  // namespace vpns
