// The gradient of kept blocks of weights, in the order in which they are packed; or of the scores of all blocks.
//
// d weight[k, c, tap] = Σ over output pixels of dy[pixel, k] · x[pixel's tap, c]. The score of a block is one number,
// Σ W · dW over the block, masked or not: the same sums, multiplied by W tile by tile, so that no dense dW is written.
// Scores of single weights take the sums of all blocks of a dense weight and leave sign(S) · W · dW, weight by weight.
//
// Tiles of pixels are laid out: the input as planes [chunk of bc channels][row][column][channel], padded with zeros, so
// that a tap is one offset; the gradient of the output as [block row][pixel][padded bk]. Of each block a few channels ×
// two vectors of output channels of sums stay in registers while the tile's pixels stream past; on AMX 32 × 32 sums, in
// tiles (weight_gradient_amx.inl). The unit is a 32-bit word: a pixel in float32, the same pixel of two images in bf16.
// Sums run over a slice's tiles in order and then over the slices in order, whichever threads take them, so the result
// does not depend on their number.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "arithmetic.h"
#include "cpu/masked_weight.h"
#include "cpu/sparse_conv2d_block.h"
#include "params.h"

namespace vpns {

struct WeightGradCall {
  const void* x;  // [N, H, W, C], contiguous channels
  DType dtype;    // of x and grad
  int64_t x_stride_n, x_stride_h, x_stride_w;
  const void* grad;  // [N, P, Q, K] dense
  float* out;        // [count, bk, bc], or with `weight` [count]
  int threads;
  const MaskedWeight* weight = nullptr;  // where not null: Σ weight · gradient of each block
  // Where not null too: of single weights, as `out` dense [K, C / groups, R, S], which is sign · weight · gradient.
  const float* scores = nullptr;
};

struct BlockGradPlan {
  struct Block {
    int64_t k0, c0, tap;        // its first output channel (of all), input channel (of its group) and tap
    int64_t filters, channels;  // fewer than bk, bc at ragged edges
    int64_t row, chunk;         // of the laid-out gradient and input
    int64_t offset;             // of its first channel, words from an output pixel's base in the chunk
    int64_t position;           // in the layout
  };
  // Consecutive blocks whose words are neighbours, as those of a stem are.
  struct Span {
    int64_t first, blocks, words;
  };
  ConvShape shape;
  BlockAxis h, w;
  int64_t bk, bc, padded_bk;
  int64_t chunk_channels;                 // words of a pixel in a chunk
  int64_t chunks_per_group, rows_per_group;
  int64_t images;                         // of a word
  int64_t tile_p, tile_q, tile_units;     // output pixels and words of images of a tile
  int64_t rows, cols;                     // of its planes
  int64_t line = 0;                       // positions of one AMX product; 0 for vectors
  bool over_images = false;               // a line's positions: words of images, or columns of outputs
  int64_t count;                          // of the layout's blocks
  std::vector<Block> blocks;              // but those of taps that see padding alone, whose gradient is zero
  std::vector<Span> spans;

  int64_t chunk_words() const { return tile_units * rows * cols * chunk_channels; }
  int64_t row_words() const {
    return (line == 0 ? tile_units * tile_p * tile_q : lines(tile_units, tile_p, tile_q) * line) * padded_bk;
  }
  int64_t lines(int64_t units, int64_t height, int64_t width) const {
    const int64_t extent = over_images ? units : width;
    return ceil_div(extent, line) * height * (over_images ? width : units);
  }
};

class PreparedWeightGrad {
 public:
  virtual ~PreparedWeightGrad() = default;
  virtual void run(const WeightGradCall& call) const = 0;
};

// For the layout of block weights; their values are not read. `kernel` is "amx" or "avx512_bf16" (bf16 only), "avx512",
// "avx2" or one of the first three with "_emulated", or empty for the first that this machine runs.
std::unique_ptr<PreparedWeightGrad> prepare_weight_gradient(const ConvShape&, const SparseWeights& layout,
                                                            const std::string& kernel = "");

// Of all units of a masked weight: call.out [block rows, block columns, R, S], or with call.scores
// [K, C / groups, R, S].
void score_gradient(const ConvShape&, const WeightGradCall& call, const std::string& kernel);

// Slices of the tiles that have sums of their own, where these are gradients, and what all of them may take.
constexpr int64_t kMostSlices = 16, kSliceFloats = 2 * 1024 * 1024;

using RunBlockGrad = void (*)(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_avx2(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_avx512(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_avx512_bf16(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_amx(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_avx512_emulated(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_avx512_bf16_emulated(const BlockGradPlan&, const WeightGradCall&);
void run_block_grad_amx_emulated(const BlockGradPlan&, const WeightGradCall&);

}  // namespace vpns
