// Everything that is compiled for AVX-512 with BF16.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "cpu/depthwise.h"
#include "cpu/grouped.h"
#include "cpu/multiply_rate.h"
#include "cpu/phases.h"
#include "cpu/prompt_conv2d.h"
#include "cpu/scratch.h"
#include "cpu/sparse_conv2d_block.h"
#include "cpu/weight_gradient.h"

#define VPNS_LANES 16
#define VPNS_BLOCK_PIXELS kBlockPixelsAvx512
#define VPNS_MULTIPLY_LOOP run_multiply_loop_avx512_bf16

namespace vpns {
namespace {
#include "cpu/simd.inl"
#include "cpu/multiply_rate.inl"
#include "cpu/sparse_conv2d_channels.inl"
#include "cpu/sparse_conv2d_block_rows.inl"
#include "cpu/sparse_conv2d_block.inl"
#include "cpu/weight_gradient.inl"
#include "cpu/weight_gradient_vectors.inl"
#include "cpu/prompt_conv2d.inl"
#include "cpu/prompt_conv2d_gradients.inl"
#include "cpu/lanes.inl"
#include "cpu/channel_tiles.inl"
#include "cpu/depthwise.inl"
#include "cpu/grouped.inl"
}  // namespace

void run_block_avx512_bf16(const BlockPlan& plan, const ConvCall& call) { run_block<Bf16>(plan, call); }
void run_block_grad_avx512_bf16(const BlockGradPlan& plan, const WeightGradCall& call) {
  run_block_grad<VectorProducts<Bf16>>(plan, call);
}

void run_grouped_avx512_bf16(const GroupedPlan& plan, const ConvCall& call) {
  with_types(call, [&](auto, auto y) { run_grouped<ReadsGroupOfPairs, Bf16, decltype(y)>(plan, call); });
}

void run_depthwise_avx512_bf16(const DepthwisePlan& plan, const ConvCall& call) {
  with_types(call, [&](auto x, auto y) { run_depthwise<decltype(x), decltype(y)>(plan, call); });
}

PromptSteps run_prompt_steps_avx512_bf16() { return prompt_steps<Bf16>(); }

}  // namespace vpns
