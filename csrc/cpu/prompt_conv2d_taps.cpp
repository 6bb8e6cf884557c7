#include "cpu/prompt_conv2d_taps.h"

#include <algorithm>

namespace vpns {

TapBlocks tap_blocks(const ConvShape& s, const void* weight, DType dtype, int64_t rows) {
  TapBlocks blocks;
  blocks.rows = rows;
  blocks.dtype = dtype;
  const int64_t bytes = bytes_of(dtype), taps = s.R * s.S;
  const char* const from = static_cast<const char*>(weight);
  std::vector<char> block(rows * 3 * bytes);
  // A masked negative weight is a negative zero: only the sign, which is in an element's last byte, may be set.
  const auto is_empty = [&block, bytes] {
    for (size_t i = 0; i < block.size(); ++i)
      if ((block[i] & ((i + 1) % bytes == 0 ? 0x7f : 0xff)) != 0) return false;
    return true;
  };
  for (int64_t k = 0; k < s.K; k += rows) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      std::fill(block.begin(), block.end(), 0);
      for (int64_t i = 0; i < std::min(rows, s.K - k) * 3; ++i)
        std::copy_n(from + ((k * 3 + i) * taps + tap) * bytes, bytes, block.data() + i * bytes);
      if (is_empty()) continue;
      blocks.index.push_back(static_cast<int32_t>(tap));
      blocks.values.insert(blocks.values.end(), block.begin(), block.end());
    }
    blocks.indptr.push_back(static_cast<int32_t>(blocks.index.size()));
  }
  return blocks;
}

TapsOfAxis taps_of_axis(int64_t extent, int64_t outputs, int64_t taps, int64_t stride, int64_t pad, int64_t dilation) {
  TapsOfAxis axis;
  for (int64_t at = 0; at < extent; ++at) {
    axis.first.push_back(static_cast<int64_t>(axis.taps.size()));
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t from = at + pad - tap * dilation;
      if (from >= 0 && from % stride == 0 && from / stride < outputs)
        axis.taps.push_back({static_cast<int32_t>(tap), static_cast<int32_t>(from / stride)});
    }
  }
  axis.first.push_back(static_cast<int64_t>(axis.taps.size()));
  return axis;
}

}  // namespace vpns
