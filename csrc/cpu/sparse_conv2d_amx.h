// Block-sparse convolution in bf16 on AMX tiles: what is prepared, and the one loop over it.
//
// A tile of the input is laid out as planes [pixel][lane][channel] in bf16, lanes being 16 images where the batch has
// them, else nothing (then 16 neighbouring pixels stand in). Sixteen rows at a constant distance are one A tile; a kept
// block's weights, in pairs of input channels, are B tiles. 32 rows × 32 output channels of sums stay in four tile
// registers while all kept blocks of those channels stream past; sums are float32 and are rounded once, at the store.
// Groups of blocks have sums of their own, which are added up in memory: one running sum would lose too much.
// Channel weights are blocks that are all kept, of the kept channels alone.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/planes.h"
#include "cpu/sparse_conv2d_channels.h"
#include "params.h"

namespace vpns {

constexpr int kTileRows = 16;

// Products that one running sum may take.
constexpr int64_t kAmxSumTerms = 1024;

struct AmxPlan {
  ConvShape shape;  // of the blocks: of channel weights, C and K are the kept ones
  bool images_in_lanes;
  Planes planes;
  int64_t bk, bc;
  int64_t step;            // input channels of one tile product: 32, or 16 for blocks of 16
  int64_t group_channels;  // channels of a group in the planes, rounded up to whole blocks
  std::vector<uint16_t> weights;  // [blocks][bk / 16][bc / step][step / 2][16][2]
  std::vector<int64_t> offsets;   // by block, elements from an output pixel's base
  std::vector<int64_t> starts;    // [block rows + 1]
  int64_t outputs, inputs;        // channels of y and of x
  std::vector<uint16_t> gather;   // kept input channels; empty where all are
  std::vector<uint16_t> keeps;    // kept output channels of the spans
  std::vector<OutputSpan> spans;  // by block row and 32 of its output channels
  std::vector<int64_t> first_span;  // [block rows + 1]
};

// The images [first_image, first_image + images) of a call; images fills whole groups of lanes where they are lanes.
using RunAmx = void (*)(const AmxPlan&, const ConvCall&, int64_t first_image, int64_t images);

void run_amx(const AmxPlan&, const ConvCall&, int64_t first_image, int64_t images);
void run_amx_emulated(const AmxPlan&, const ConvCall&, int64_t first_image, int64_t images);

// The planes of a task stay within this many bytes: half of the second-level cache of the CPUs that have AMX.
constexpr int64_t kAmxPlaneBytes = 1024 * 1024;

}  // namespace vpns
