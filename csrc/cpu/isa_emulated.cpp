// The AVX-512 and AMX kernels over AVX2 registers and emulated tiles, so that their logic is tested on lesser machines.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "cpu/phases.h"
#include "cpu/prompt_conv2d.h"
#include "cpu/scratch.h"
#include "cpu/sparse_conv2d_amx.h"
#include "cpu/sparse_conv2d_block.h"
#include "cpu/sparse_conv2d_unstructured.h"
#include "cpu/weight_gradient.h"
#include "cpu/weight_gradient_unstructured.h"

#define VPNS_LANES 16
#define VPNS_MAX_SEGMENT kMaxSegmentAvx512
#define VPNS_RUN_UNSTRUCTURED run_unstructured_avx512_emulated
#define VPNS_MAX_GRAD_SEGMENT kMaxGradSegmentAvx512
#define VPNS_RUN_UNSTRUCTURED_GRAD run_unstructured_grad_avx512_emulated
#define VPNS_BLOCK_PIXELS kBlockPixelsAvx512
#define VPNS_RUN_AMX run_amx_emulated

namespace vpns {
namespace {
#include "cpu/simd.inl"
#include "cpu/lanes.inl"
#include "cpu/sparse_conv2d_unstructured.inl"
#include "cpu/weight_gradient_unstructured.inl"
#include "cpu/sparse_conv2d_channels.inl"
#include "cpu/sparse_conv2d_block_rows.inl"
#include "cpu/sparse_conv2d_block.inl"
#include "cpu/weight_gradient.inl"
#include "cpu/weight_gradient_vectors.inl"
#include "cpu/tiles_emulated.inl"
#include "cpu/sparse_conv2d_amx.inl"
#include "cpu/weight_gradient_amx.inl"
#include "cpu/prompt_conv2d.inl"
#include "cpu/prompt_conv2d_gradients.inl"
}  // namespace

void run_block_avx512_emulated(const BlockPlan& plan, const ConvCall& call) { run_block<float>(plan, call); }
void run_block_grad_avx512_emulated(const BlockGradPlan& plan, const WeightGradCall& call) {
  run_block_grad<VectorProducts<float>>(plan, call);
}
void run_block_grad_avx512_bf16_emulated(const BlockGradPlan& plan, const WeightGradCall& call) {
  run_block_grad<VectorProducts<Bf16>>(plan, call);
}
void run_block_grad_amx_emulated(const BlockGradPlan& plan, const WeightGradCall& call) {
  run_block_grad<TileProducts>(plan, call);
}
void run_block_avx512_bf16_emulated(const BlockPlan& plan, const ConvCall& call) { run_block<Bf16>(plan, call); }

PromptSteps run_prompt_steps_avx512_emulated() { return prompt_steps<float>(); }
PromptSteps run_prompt_steps_avx512_bf16_emulated() { return prompt_steps<Bf16>(); }

}  // namespace vpns
