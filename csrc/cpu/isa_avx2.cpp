// Everything that is compiled for AVX2 and FMA.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "cpu/batch_norm_act.h"
#include "cpu/channel_mask.h"
#include "cpu/curves.h"
#include "cpu/depthwise.h"
#include "cpu/grouped.h"
#include "cpu/elementwise.h"
#include "cpu/multiply_rate.h"
#include "cpu/phases.h"
#include "cpu/pooling.h"
#include "cpu/prompt_conv2d.h"
#include "cpu/scratch.h"
#include "cpu/sparse_conv2d_block.h"
#include "cpu/sparse_conv2d_unstructured.h"
#include "cpu/weight_gradient.h"
#include "cpu/weight_gradient_unstructured.h"

#define VPNS_LANES 8
#define VPNS_MAX_SEGMENT kMaxSegmentAvx2
#define VPNS_RUN_UNSTRUCTURED run_unstructured_avx2
#define VPNS_MAX_GRAD_SEGMENT kMaxGradSegmentAvx2
#define VPNS_RUN_UNSTRUCTURED_GRAD run_unstructured_grad_avx2
#define VPNS_BLOCK_PIXELS kBlockPixelsAvx2
#define VPNS_RUN_BATCH_NORM_ACT run_batch_norm_act_avx2
#define VPNS_RUN_BATCH_NORM_ACT_BACKWARD run_batch_norm_act_backward_avx2
#define VPNS_RUN_CHANNEL_MASK run_channel_mask_avx2
#define VPNS_RUN_CHANNEL_MASK_BACKWARD run_channel_mask_backward_avx2
#define VPNS_MULTIPLY_LOOP run_multiply_loop_avx2

namespace vpns {
namespace {
#include "cpu/simd.inl"
#include "cpu/multiply_rate.inl"
#include "cpu/lanes.inl"
#include "cpu/sparse_conv2d_unstructured.inl"
#include "cpu/weight_gradient_unstructured.inl"
#include "cpu/sparse_conv2d_channels.inl"
#include "cpu/sparse_conv2d_block_rows.inl"
#include "cpu/sparse_conv2d_block.inl"
#include "cpu/weight_gradient.inl"
#include "cpu/weight_gradient_vectors.inl"
#include "cpu/batch_norm_act.inl"
#include "cpu/channel_mask.inl"
#include "cpu/elementwise.inl"
#include "cpu/curves.inl"
#include "cpu/pooling.inl"
#include "cpu/prompt_conv2d.inl"
#include "cpu/prompt_conv2d_gradients.inl"
#include "cpu/channel_tiles.inl"
#include "cpu/depthwise.inl"
#include "cpu/grouped.inl"
}  // namespace

void run_block_avx2(const BlockPlan& plan, const ConvCall& call) { run_block<float>(plan, call); }
void run_block_grad_avx2(const BlockGradPlan& plan, const WeightGradCall& call) {
  run_block_grad<VectorProducts<float>>(plan, call);
}

void run_grouped_avx2(const GroupedPlan& plan, const ConvCall& call) {
  with_types(call, [&](auto x, auto y) { run_grouped<ReadsGroup, decltype(x), decltype(y)>(plan, call); });
}

void run_depthwise_avx2(const DepthwisePlan& plan, const ConvCall& call) {
  with_types(call, [&](auto x, auto y) { run_depthwise<decltype(x), decltype(y)>(plan, call); });
}

PromptSteps run_prompt_steps_avx2() { return prompt_steps<float>(); }

}  // namespace vpns
