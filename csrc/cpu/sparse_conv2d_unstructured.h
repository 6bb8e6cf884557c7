// Unstructured sparse convolution, index-driven: what is prepared, and the one loop over it.
//
// Vector lanes are images where the batch fills them, else neighbouring pixels. A tile of the input is laid out as planes
// [channel][pixel][lane] (planes.h), so that a kept weight is an offset and a value. For a segment of up to kMaxSegment
// output vectors and one output channel, the sums stay in registers while the channel's kept weights stream past: per
// weight one broadcast and one multiply-add with a memory operand per vector. Input channels come in chunks whose
// segment lies in the first-level cache; between chunks the sums rest in a buffer of the second level.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/planes.h"
#include "params.h"

namespace vpns {

struct TapEntry {
  int32_t offset;  // floats from the segment's base to the vector this weight multiplies
  float weight;
};

// `vectors` output vectors that begin `offset` floats after the tile's base.
struct Segment {
  int32_t offset;
  int32_t vectors;
  int32_t first;  // flat number of the first lane, counted in lanes over the whole tile
};

struct UnstructuredPlan {
  ConvShape shape;
  bool images_in_lanes;
  int lanes;
  Planes planes;
  int64_t channel_stride;  // floats between two channels of the planes
  int64_t chunk;           // input channels of a chunk
  int64_t chunks;
  std::vector<TapEntry> entries;  // ordered by group, chunk, output channel
  std::vector<int64_t> starts;    // [groups][chunks][K / groups + 1]
  std::vector<Segment> segments;
};

// The images [first_image, first_image + images) of a call; images fills whole groups of lanes where they are lanes.
using RunUnstructured = void (*)(const UnstructuredPlan&, const ConvCall&, int64_t first_image, int64_t images);

void run_unstructured_avx2(const UnstructuredPlan&, const ConvCall&, int64_t first_image, int64_t images);
void run_unstructured_avx512(const UnstructuredPlan&, const ConvCall&, int64_t first_image, int64_t images);
void run_unstructured_avx512_emulated(const UnstructuredPlan&, const ConvCall&, int64_t first_image, int64_t images);

// Registers that hold sums: of 16 (32) one holds the weight, one is left to the compiler.
constexpr int kMaxSegmentAvx2 = 14;
constexpr int kMaxSegmentAvx512 = 28;

}  // namespace vpns
