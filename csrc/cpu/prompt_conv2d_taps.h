// Which taps of the first filter are there: those its mask left, and those that a row or column of the canvas meets.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/prompt_conv2d.h"
#include "params.h"

namespace vpns {

// The weight [K, 3, R, S] as blocks of `rows` filters by three colours: taps that a mask emptied are left out.
struct TapBlocks {
  std::vector<char> values;
  std::vector<int32_t> indptr{0}, index;
  int64_t rows;
  DType dtype;

  SparseWeights view() const {
    const int64_t count = static_cast<int64_t>(index.size());
    return {Format::kBlock, dtype, values.data(), indptr.data(), index.data(), count, rows, 3};
  }
};

TapBlocks tap_blocks(const ConvShape&, const void* weight, DType, int64_t rows);

// Of every row (or column) of the canvas.
TapsOfAxis taps_of_axis(int64_t extent, int64_t outputs, int64_t taps, int64_t stride, int64_t pad, int64_t dilation);

}  // namespace vpns
