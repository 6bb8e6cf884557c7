// Unstructured sparse convolution, index-driven: what is prepared, and the one loop over it.
//
// A vector's lanes are images, or patches of an image where there are too few: 16 lanes hold 16 images, or 4 images cut
// into 2 × 2 patches, or one image cut into 4 × 4. The input is laid out as planes [channel][pixel][lane] (planes.h),
// so that a kept weight is an offset and a value, and every vector is aligned whatever the tap. For a segment (up to 4
// rows of output vectors, as many as fit the registers) and one output channel, the sums stay in registers while the
// channel's kept weights stream past: per weight one broadcast and one multiply-add with a memory operand per vector.
// Input channels come in chunks whose segment lies in the first-level cache. Output channels come in blocks: between
// chunks the sums of a block rest in the second level. Within a chunk, output channels are ordered by how many weights
// they keep, so that the processor predicts where the loop over weights ends.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/planes.h"
#include "cpu/tasks.h"
#include "params.h"

namespace vpns {

// A vector length: how many lanes of how many bytes, how many vectors a segment has at most, and how many weights one
// sum adds up.
struct UnstructuredVectors {
  int lanes, lane_bytes, most;
  int64_t chunk_weights;
  bool has_gradient;  // of the outputs, laid out beside the planes of a tile
};

// Lane number (image · patches_h + row of patches) · patches_w + column of patches.
struct Lanes {
  int count;
  int images, patches_h, patches_w;
  int64_t patch_p, patch_q;  // output pixels of a patch
};

// The entries that an output channel of a block has in a chunk; they follow those of the run before.
struct Run {
  int32_t filter;  // counted from the block's first
  int32_t count;
};

// Where the runs of a (group, block, chunk) begin; they end where the next begin.
struct RunStart {
  int64_t run, entry;
};

struct UnstructuredPlan {
  ConvShape shape;
  Lanes lanes;
  Planes planes;                // of a tile of patch pixels
  int64_t rows, cols;           // of a segment; less at the patch's edge
  int64_t channel_stride;       // elements between two channels of the planes
  int64_t chunks;               // of input channels
  std::vector<int64_t> blocks;  // output channels of block b of a group: [blocks[b], blocks[b + 1])
  std::vector<int32_t> offsets;  // by entry: elements from the segment's base to the vector it multiplies
  std::vector<int32_t> from;     // by entry, which packed weight it is
  std::vector<Run> runs;
  std::vector<RunStart> starts;  // [groups][blocks][chunks], and the end

  int64_t block_count() const { return static_cast<int64_t>(blocks.size()) - 1; }
};

// A plan and the images [first_image, first_image + images) of a call that it takes: those that fill lanes, or those
// left over. Lanes beyond the last stay empty.
struct UnstructuredPart {
  UnstructuredPlan plan;
  int64_t first_image, images;
};

// For a layout, whatever its values.
std::vector<UnstructuredPart> make_unstructured_parts(const ConvShape&, const SparseWeights& layout,
                                                      const UnstructuredVectors&);

// `weights` are those of the part's entries.
using RunUnstructured = void (*)(const UnstructuredPart&, const float* weights, const ConvCall&);
void run_unstructured_avx2(const UnstructuredPart&, const float* weights, const ConvCall&);
void run_unstructured_avx512(const UnstructuredPart&, const float* weights, const ConvCall&);
void run_unstructured_avx512_emulated(const UnstructuredPart&, const float* weights, const ConvCall&);
void run_unstructured_avx512_fp16(const UnstructuredPart&, const float* weights, const ConvCall&);
void run_unstructured_avx512_fp16_emulated(const UnstructuredPart&, const float* weights, const ConvCall&);

// Registers that hold sums: of 16 (32) one holds the weight, one is left to the compiler.
constexpr int kMaxSegmentAvx2 = 14;
constexpr int kMaxSegmentAvx512 = 28;
// What one sum may add up, in float without losing more to rounding than a dense kernel does, and in fp16.
constexpr int64_t kMaxChunkWeights = 256, kMaxChunkWeightsFp16 = 64;
// Rows of a segment: as many as one base and one distance reach without further address arithmetic.
constexpr int kMaxSegmentRows = 4;
// Output channels of a block.
constexpr int64_t kMaxBlockFilters = 128;

}  // namespace vpns
