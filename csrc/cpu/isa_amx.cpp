// Everything that is compiled for AMX (with AVX-512 for the stores).
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "arithmetic.h"
#include "cpu/multiply_rate.h"
#include "cpu/phases.h"
#include "cpu/scratch.h"
#include "cpu/sparse_conv2d_amx.h"
#include "cpu/sparse_conv2d_block.h"
#include "cpu/weight_gradient.h"

#define VPNS_LANES 16
#define VPNS_RUN_AMX run_amx

namespace vpns {
namespace {
#include "cpu/simd.inl"
#include "cpu/lanes.inl"
#include "cpu/sparse_conv2d_channels.inl"
#include "cpu/sparse_conv2d_block_rows.inl"
#include "cpu/sparse_conv2d_amx.inl"
#include "cpu/weight_gradient.inl"
#include "cpu/weight_gradient_amx.inl"

// Four sums, from tiles that stay where they are.
void multiply_tile_rounds(int64_t rounds) {
  configure_tiles(32);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}
}  // namespace

MultiplyLoop run_multiply_loop_amx() { return {4.0 * 2 * 16 * 16 * 32, multiply_tile_rounds}; }

void run_block_grad_amx(const BlockGradPlan& plan, const WeightGradCall& call) {
  run_block_grad<TileProducts>(plan, call);
}

}  // namespace vpns
