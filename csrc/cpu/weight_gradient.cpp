#include "cpu/weight_gradient.h"

#include <algorithm>
#include <numeric>

#include "arithmetic.h"
#include "checks.h"
#include "cpu/isa.h"
#include "cpu/planes.h"

namespace vpns {
namespace {

// What a block reads of a tile stays in the second-level cache, a tile in the third.
constexpr int64_t kOperandBytes = 256 * 1024, kTileBytes = 4 * 1024 * 1024;
// Words that share a pass over the pixels, where blocks are narrower.
constexpr int64_t kSpanWords = 96;
// Where single weights have scores, all of them are taken in blocks of this size.
constexpr int64_t kDenseBlock = 32;
// Positions of one AMX product.
constexpr int64_t kMaxLine = 16;

struct GradKernel {
  const char* name;
  Isa isa;
  bool emulated;  // only by name
  int64_t lanes;
  bool pairs;  // words of two bf16 images
  bool tiles;  // AMX's, over lines of positions
  RunBlockGrad run;
};

const std::vector<GradKernel>& grad_kernels() {
  static const std::vector<GradKernel> table = {
#if defined(VPNS_WITH_AMX)
      {"amx", Isa::kAmx, false, 16, true, true, run_block_grad_amx},
#endif
#if defined(VPNS_WITH_AVX512_BF16)
      {"avx512_bf16", Isa::kAvx512Bf16, false, 16, true, false, run_block_grad_avx512_bf16},
#endif
#if defined(VPNS_WITH_AVX512)
      {"avx512", Isa::kAvx512, false, 16, false, false, run_block_grad_avx512},
#endif
#if defined(VPNS_WITH_AVX2)
      {"avx2", Isa::kAvx2, false, 8, false, false, run_block_grad_avx2},
      {"avx512_emulated", Isa::kAvx2, true, 16, false, false, run_block_grad_avx512_emulated},
      {"avx512_bf16_emulated", Isa::kAvx2, true, 16, true, false, run_block_grad_avx512_bf16_emulated},
      {"amx_emulated", Isa::kAvx2, true, 16, true, true, run_block_grad_amx_emulated},
#endif
  };
  return table;
}

// Null where there is none.
const GradKernel* find_grad_kernel(const std::string& name, DType dtype) {
  for (const GradKernel& kernel : grad_kernels())
    if ((name.empty() ? !kernel.emulated : name == kernel.name) && isa_usable(kernel.isa) &&
        (!kernel.pairs || dtype == DType::kBF16))
      return &kernel;
  return nullptr;
}

[[noreturn]] void refuse(const std::string& name) {
  fail("weight_gradient", "a kernel for this type on a CPU with AVX2", name.empty() ? "none, or a cap below it" : name);
}

void set_tile(BlockGradPlan& plan) {
  const ConvShape& s = plan.shape;
  const int64_t units = ceil_div(s.N, plan.images), chunks = s.groups * plan.chunks_per_group;
  plan.tile_p = s.P;
  plan.tile_q = s.Q;
  plan.tile_units = plan.over_images ? even_tile(units, kMaxLine) : 1;
  const auto too_large = [&] {
    plan.rows = plan.h.extent(plan.tile_p);
    plan.cols = plan.w.extent(plan.tile_q);
    const int64_t chunk = 4 * plan.chunk_words(), row = 4 * plan.row_words();
    return std::max(chunk, row) > kOperandBytes || chunks * chunk + s.groups * plan.rows_per_group * row > kTileBytes;
  };
  while (too_large() && plan.tile_p > 1) plan.tile_p = even_tile(s.P, plan.tile_p - 1);
  while (too_large() && plan.tile_q > 16) plan.tile_q = even_tile(s.Q, plan.tile_q - 1);
  if (plan.tile_p < s.P || plan.tile_q < s.Q || plan.over_images) return;
  while (plan.tile_units < units) {
    ++plan.tile_units;
    if (!too_large()) continue;
    plan.tile_units = even_tile(units, plan.tile_units - 1);
    return;
  }
}

// Lines of the same length in all tiles, the last and smallest too.
void set_line(BlockGradPlan& plan) {
  const int64_t extent = plan.over_images ? ceil_div(plan.shape.N, plan.images) : plan.shape.Q;
  const int64_t tile = plan.over_images ? plan.tile_units : plan.tile_q;
  plan.line = even_tile(extent - (ceil_div(extent, tile) - 1) * tile, kMaxLine);
}

// Consecutive blocks of a row whose words follow each other become one span.
void add_spans(BlockGradPlan& plan) {
  const int64_t count = static_cast<int64_t>(plan.blocks.size());
  for (int64_t i = 0; i < count; ++i) {
    const BlockGradPlan::Block& block = plan.blocks[i];
    if (!plan.spans.empty()) {
      BlockGradPlan::Span& span = plan.spans.back();
      const BlockGradPlan::Block& first = plan.blocks[span.first];
      if (first.row == block.row && first.chunk == block.chunk && first.offset + span.words == block.offset &&
          span.words + block.channels <= kSpanWords) {
        ++span.blocks;
        span.words += block.channels;
        continue;
      }
    }
    plan.spans.push_back({i, 1, block.channels});
  }
}

BlockGradPlan make_plan(const ConvShape& s, const SparseWeights& layout, const GradKernel& kernel) {
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups, taps = s.R * s.S, bk = layout.bk, bc = layout.bc;
  BlockGradPlan plan{};
  plan.shape = s;
  plan.h = make_block_axis(s.R, s.stride_h, s.dilation_h);
  plan.w = make_block_axis(s.S, s.stride_w, s.dilation_w);
  plan.bk = bk;
  plan.bc = bc;
  plan.padded_bk = round_up(bk, kernel.lanes);
  plan.chunk_channels = std::min(bc, channels);
  plan.chunks_per_group = ceil_div(channels, bc);
  plan.rows_per_group = ceil_div(filters, bk);
  plan.images = kernel.pairs ? 2 : 1;
  if (kernel.tiles) {
    plan.line = kMaxLine;
    // Images lie far apart: only where rows of outputs leave most of a product empty.
    plan.over_images = even_tile(ceil_div(s.N, plan.images), kMaxLine) >= 2 * even_tile(s.Q, kMaxLine);
  }
  set_tile(plan);
  if (kernel.tiles) set_line(plan);
  const std::vector<uint8_t> reaches = reaching_taps(s);
  plan.count = layout.count;
  plan.blocks.reserve(layout.count);
  for (int64_t row = 0; row < s.groups * plan.rows_per_group; ++row)
    for (int32_t i = layout.indptr[row]; i < layout.indptr[row + 1]; ++i) {
      const int64_t tap = layout.index[i] % taps, chunk = layout.index[i] / taps, group = row / plan.rows_per_group;
      if (!reaches[tap]) continue;
      const int64_t in_group = row % plan.rows_per_group * bk;
      const int64_t at = tap / s.S * plan.h.distance * plan.cols + tap % s.S * plan.w.distance;
      plan.blocks.push_back({group * filters + in_group, chunk * bc, tap, std::min(bk, filters - in_group),
                             std::min(bc, channels - chunk * bc), row, group * plan.chunks_per_group + chunk,
                             at * plan.chunk_channels, i});
    }
  add_spans(plan);
  return plan;
}

class PreparedBlockGrad final : public PreparedWeightGrad {
 public:
  PreparedBlockGrad(const ConvShape& s, const SparseWeights& layout, const std::string& kernel) : name_(kernel) {
    const GradKernel* const of_pairs = find_grad_kernel(kernel, DType::kBF16);
    const GradKernel* const of_floats = find_grad_kernel(kernel, DType::kF32);
    if (of_pairs == nullptr) refuse(kernel);
    pairs_ = {make_plan(s, layout, *of_pairs), of_pairs->run};
    if (of_floats != nullptr && of_floats != of_pairs) floats_ = {make_plan(s, layout, *of_floats), of_floats->run};
    takes_floats_ = of_floats != nullptr;
  }
  void run(const WeightGradCall& call) const override {
    if (call.dtype != DType::kBF16 && !takes_floats_) refuse(name_);
    const Form& form = call.dtype == DType::kBF16 || floats_.run == nullptr ? pairs_ : floats_;
    form.run(form.plan, call);
  }

 private:
  struct Form {
    BlockGradPlan plan;
    RunBlockGrad run = nullptr;
  };
  std::string name_;
  Form pairs_, floats_;  // of bf16, and of other types where that is another
  bool takes_floats_;
};

}  // namespace

std::unique_ptr<PreparedWeightGrad> prepare_weight_gradient(const ConvShape& s, const SparseWeights& layout,
                                                            const std::string& kernel) {
  check(layout.format == Format::kBlock, "weight_gradient", "block weights", static_cast<int>(layout.format));
  return std::make_unique<PreparedBlockGrad>(s, layout, kernel);
}

void score_gradient(const ConvShape& s, const WeightGradCall& call, const std::string& kernel) {
  const bool singles = call.scores != nullptr;
  const int64_t bk = singles ? kDenseBlock : call.weight->bk, bc = singles ? kDenseBlock : call.weight->bc;
  const int64_t rows = s.groups * ceil_div(s.K / s.groups, bk), columns = ceil_div(s.C / s.groups, bc) * s.R * s.S;
  std::vector<int32_t> indptr(rows + 1), index(rows * columns);
  for (int64_t row = 0; row <= rows; ++row) indptr[row] = static_cast<int32_t>(row * columns);
  for (int64_t i = 0; i < rows * columns; ++i) index[i] = static_cast<int32_t>(i % columns);
  const SparseWeights all{Format::kBlock, DType::kF32, nullptr, indptr.data(), index.data(), rows * columns, bk, bc};
  const GradKernel* const chosen = find_grad_kernel(kernel, call.dtype);
  if (chosen == nullptr) refuse(kernel);
  chosen->run(make_plan(s, all, *chosen), call);
}

}  // namespace vpns
