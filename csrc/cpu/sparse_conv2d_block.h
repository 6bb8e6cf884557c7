// Block-sparse convolution in float32: what is prepared, and the one loop over it.
//
// A tile of the input is laid out as planes [pixel][channel] (planes.h), padded with zeros, so that a kept block is one
// offset and a small dense matrix. The sums of a few output pixels × up to two vectors of output channels stay in
// registers while all kept blocks of those channels stream past: a matrix product whose inner dimension is only what was
// kept. A 1×1 layer without padding reads the input where it is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/planes.h"
#include "params.h"

namespace vpns {

struct BlockPlan {
  ConvShape shape;
  Planes planes;
  int64_t bk, bc;
  int64_t padded_bk;       // bk rounded up to whole vectors
  int64_t group_channels;  // channels of a group in the planes, rounded up to whole blocks
  bool may_read_in_place;  // a float32 input can itself serve as the planes
  std::vector<float> weights;    // [blocks][bc][padded_bk]
  std::vector<int64_t> offsets;  // by block, floats from an output pixel's base
  std::vector<int64_t> starts;   // [block rows + 1]
};

using RunBlock = void (*)(const BlockPlan&, const ConvCall&);

void run_block_avx2(const BlockPlan&, const ConvCall&);
void run_block_avx512(const BlockPlan&, const ConvCall&);
void run_block_avx512_emulated(const BlockPlan&, const ConvCall&);

// Output pixels whose sums fit the registers beside two vectors of weights.
constexpr int kBlockPixelsAvx2 = 6;
constexpr int kBlockPixelsAvx512 = 12;

// The planes of a task stay within this many bytes, so that they are read from the second-level cache.
constexpr int64_t kBlockPlaneBytes = 256 * 1024;

}  // namespace vpns
