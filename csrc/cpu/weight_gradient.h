// The gradient of kept weights only, in the order in which they are packed; or of the scores of blocks.
//
// d values[i] = Σ over output pixels of dy[pixel, k] · x[pixel's tap, c], for each kept (k, c, r, s): as many operations
// as the sparse forward. The score of a block is one number, Σ W · dW over the block, and masked blocks get theirs too:
// the same sums over all blocks, multiplied by W tile by tile, so that no dense dW is ever written.
//
// Tiles of the input are laid out as planes, the gradient of the same tile beside them, by all threads; then each thread
// sums up its own share of the weights. Every sum belongs to one thread and runs over the tiles in order, so the result
// does not depend on the number of threads.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/sparse_conv2d_block.h"
#include "params.h"

namespace vpns {

struct WeightGradCall {
  const void* x;  // [N, H, W, C], contiguous channels
  DType dtype;    // of x and grad
  int64_t x_stride_n, x_stride_h, x_stride_w;
  const void* grad;     // [N, P, Q, K] dense
  const float* weight;  // null, or values [count, bk, bc]: then one sum of weight · gradient per block
  float* out;           // [count, bk, bc], or [count] with weight
  int threads;
};

// Kept blocks and where they read: what a gradient of any values of that layout needs.
struct BlockGradPlan {
  struct Block {
    int64_t offset;           // of its first channel, cells from an output pixel's base in the planes
    int64_t filter;           // its first output channel, as the gradient is laid out
    int64_t channels;         // fewer than bc at a ragged edge
  };
  BlockPlan reader;  // the planes, without weights
  int64_t bk, bc, padded_bk;
  int64_t padded_filters;  // of all groups, in the laid-out gradient
  int64_t images;          // of a tile
  std::vector<Block> blocks;
};

class PreparedWeightGrad {
 public:
  virtual ~PreparedWeightGrad() = default;
  virtual void run(const WeightGradCall& call) const = 0;
};

// For the layout of block weights; their values are not read.
std::unique_ptr<PreparedWeightGrad> prepare_weight_gradient(const ConvShape&, const SparseWeights& layout);

using RunBlockGrad = void (*)(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_avx2(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_avx512(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_avx512_emulated(const BlockGradPlan&, const WeightGradCall&);

}  // namespace vpns
