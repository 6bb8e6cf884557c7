// The gradient of unstructured weights: its instruction sets, and what is prepared.
#include "cpu/weight_gradient_unstructured.h"

#include <algorithm>
#include <utility>

#include "arithmetic.h"
#include "checks.h"
#include "cpu/isa.h"

namespace vpns {
namespace {

// All pieces' sums together take about this many bytes; but so many pieces are made wherever there are tiles.
constexpr int64_t kSumBytes = 8 * 1024 * 1024, kLeastPieces = 4;

struct Kernel {
  const char* name;
  Isa isa;
  bool emulated;  // never chosen, only named
  UnstructuredVectors vectors;
  RunUnstructuredGrad run;
};

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> rows = {
#if defined(VPNS_WITH_AVX512)
      {"unstructured_avx512", Isa::kAvx512, false, {16, 4, kMaxGradSegmentAvx512, kMaxChunkWeights, true},
       run_unstructured_grad_avx512},
#endif
#if defined(VPNS_WITH_AVX2)
      {"unstructured_avx2", Isa::kAvx2, false, {8, 4, kMaxGradSegmentAvx2, kMaxChunkWeights, true},
       run_unstructured_grad_avx2},
      {"unstructured_avx512_emulated", Isa::kAvx2, true, {16, 4, kMaxGradSegmentAvx512, kMaxChunkWeights, true},
       run_unstructured_grad_avx512_emulated},
#endif
  };
  return rows;
}

UnstructuredGradPart with_pieces(UnstructuredPart part) {
  const UnstructuredPlan& plan = part.plan;
  const int64_t entries = static_cast<int64_t>(plan.offsets.size());
  const int64_t tiles = ceil_div(part.images, plan.lanes.images) * plan.shape.groups *
                        ceil_div(plan.lanes.patch_p, plan.planes.tile_p) *
                        ceil_div(plan.lanes.patch_q, plan.planes.tile_q);
  const int64_t pieces = std::max(kSumBytes / (4 * std::max<int64_t>(entries, 1)), kLeastPieces);
  // An odd number of cache lines, as the distance of channels in the planes.
  const int64_t lines = ceil_div(plan.planes.tile_p * plan.planes.tile_q * plan.lanes.count, 16) | 1;
  return {std::move(part), tiles, std::min(tiles, pieces), lines * 16};
}

class PreparedUnstructuredGrad final : public PreparedWeightGrad {
 public:
  PreparedUnstructuredGrad(const ConvShape& s, const SparseWeights& layout, const Kernel& kernel)
      : count_(layout.count), run_(kernel.run) {
    for (UnstructuredPart& part : make_unstructured_parts(s, layout, kernel.vectors))
      parts_.push_back(with_pieces(std::move(part)));
  }

  void run(const WeightGradCall& call) const override {
    if (parts_.empty()) std::fill_n(call.out, count_, 0.0f);
    for (const UnstructuredGradPart& part : parts_) run_(part, call, &part == parts_.data());
  }

 private:
  int64_t count_;
  RunUnstructuredGrad run_;
  std::vector<UnstructuredGradPart> parts_;
};

}  // namespace

std::unique_ptr<PreparedWeightGrad> prepare_unstructured_gradient(const ConvShape& s, const SparseWeights& layout,
                                                                  const std::string& name) {
  check(layout.format == Format::kUnstructured, "weight_gradient", "unstructured weights",
        static_cast<int>(layout.format));
  for (const Kernel& kernel : kernels())
    if (isa_usable(kernel.isa) && (name.empty() ? !kernel.emulated : name == kernel.name))
      return std::make_unique<PreparedUnstructuredGrad>(s, layout, kernel);
  fail("weight_gradient", "a kernel that runs here", name.empty() ? "a CPU without AVX2, or a cap below it" : name);
}

std::vector<std::string> unstructured_gradient_kernels(bool emulated) {
  std::vector<std::string> names;
  for (const Kernel& kernel : kernels())
    if (isa_usable(kernel.isa) && (emulated || !kernel.emulated)) names.emplace_back(kernel.name);
  return names;
}

}  // namespace vpns
