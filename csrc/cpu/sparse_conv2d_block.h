// Convolution with blocks of kept weights on vectors of output channels: what is prepared, and how it is run.
//
// A tile of the input is laid out as planes [row][column][channel], padded with zeros, so that every filter tap is one
// offset and needs no border cases. What is left is a matrix product whose inner dimension is only what was kept. Its
// unit is a 32-bit word: one channel in float32, a pair of channels in bf16. Kept weights that read neighbouring words
// are one run. A 1×1 layer without padding reads the input where it is.
//
// Outputs are made by strips of up to three vectors of output channels. Where all keep the same inputs, the sums of a
// few output pixels stay in registers while all kept weights of those channels stream past. For one vector of blocks
// that would leave too little work between two runs: there up to a vector of words of weights stays in registers while
// many output pixels stream past, and the two vectors of a strip have only their stores in common.
//
// One running float32 sum over a thousand weights would be far less exact than torch's dense kernel: groups of runs
// have sums of their own, which are added up in memory.
//
// Channel weights are the same loop with everything kept: input channels are gathered when the planes are laid out,
// sums scattered among the pruned outputs when they are stored.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/sparse_conv2d_channels.h"
#include "cpu/tasks.h"
#include "params.h"

namespace vpns {

// One axis of the planes: only what some tap reads is laid out.
struct BlockAxis {
  int64_t skip;      // rows (columns) of the input from one of the planes to the next
  int64_t step;      // rows of the planes from one output to the next
  int64_t distance;  // rows of the planes from one tap to the next
  int64_t taps;

  int64_t extent(int64_t outputs) const { return (outputs - 1) * step + (taps - 1) * distance + 1; }
};

BlockAxis make_block_axis(int64_t taps, int64_t stride, int64_t dilation);

// Kept weights whose inputs are neighbours.
struct BlockRun {
  int64_t offset;  // cells from an output pixel's base
  int64_t words;
  int64_t shared = 0;  // cells that the last word has in common with the one before it: 1 of an odd number of cells
};

// Runs that share their sums.
struct BlockGroup {
  int64_t first_run;
  int64_t runs = 0;
  int64_t words = 0;
  int64_t weights;     // index of its first word of weights
  int64_t vector = 0;  // where its sums belong: of a strip whose weights stay in registers, 0 or 1
};

// The outputs that are stored together.
struct BlockStrip : OutputSpan {
  int64_t vectors;  // of sums that stay in registers, 1 to 3; 0 where weights do instead
  int64_t first_group = 0, groups = 0;

  int64_t word_vectors() const { return vectors == 0 ? 1 : vectors; }  // of a word of weights
};

struct BlockPlan {
  ConvShape shape;
  int64_t cell_bytes;     // of one channel in the planes: 4 in float32, 2 in bf16
  BlockAxis h, w;
  int64_t tile_p, tile_q; // output pixels of a piece, at most
  int64_t cols;           // of the planes of a piece
  int64_t group_cells;    // channels of a group in the planes
  bool may_read_in_place; // an input of the planes' type can itself serve as the planes
  std::vector<uint16_t> gather;  // kept input channels; empty where all are
  std::vector<uint16_t> keeps;   // kept output channels of the strips
  std::vector<BlockStrip> strips;
  std::vector<BlockGroup> groups;
  std::vector<BlockRun> runs;
  std::vector<uint32_t> weights; // by group [words][vectors][lanes]
  std::vector<int64_t> cost;     // of all strips before each, and of all: for equal parts
};

// For vectors of `lanes` floats; bf16 planes where `pairs`.
BlockPlan make_block_plan(const ConvShape&, const SparseWeights& block_or_channel_weights, int64_t lanes, bool pairs);

// The first strip of one of `parts` parts of about the same cost.
int64_t first_strip(const BlockPlan&, int64_t part, int64_t parts);

// Some outputs of a call: images [n0, n1), rows [p0, p1), columns [q0, q1).
struct BlockPiece {
  int64_t n0, n1, p0, p1, q0, q1;
};

// How a call is shared out. The outputs are cut into pieces: groups of images × tiles of rows × tiles of columns. The
// first `whole` pieces are tasks as they are; each of the others, too few for all threads, is `parts` tasks, which take
// strips of about the same cost and lay out its planes each for itself: to fetch what another core has just written
// takes longer.
struct BlockTasks {
  int64_t groups, tiles_p, tiles_q;
  int64_t whole, parts;

  int64_t pieces() const { return groups * tiles_p * tiles_q; }
  int64_t count() const { return whole + (pieces() - whole) * parts; }
};

BlockTasks cut_tasks(const BlockPlan&, const ConvCall&);

// Of one of the pieces.
BlockPiece find_piece(const BlockPlan&, const ConvCall&, const BlockTasks&, int64_t piece);

using RunBlock = void (*)(const BlockPlan&, const ConvCall&);

void run_block_avx2(const BlockPlan&, const ConvCall&);
void run_block_avx512(const BlockPlan&, const ConvCall&);
void run_block_avx512_bf16(const BlockPlan&, const ConvCall&);
void run_block_avx512_emulated(const BlockPlan&, const ConvCall&);
void run_block_avx512_bf16_emulated(const BlockPlan&, const ConvCall&);

// Output pixels whose sums fit the registers beside two vectors of weights; multiples of 3, as strips have up to three.
constexpr int kBlockPixelsAvx2 = 6;
constexpr int kBlockPixelsAvx512 = 12;

// Words of weights that one running sum may take: adding up costs about 2 % of the products.
constexpr int64_t kWideGroupWords = 96;
constexpr int64_t kGroupWords = 192;

// The planes of a piece stay within this many bytes, so that they are read from the second-level cache.
constexpr int64_t kBlockPlaneBytes = 256 * 1024;

}  // namespace vpns
