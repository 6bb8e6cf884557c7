// Lowering without im2col: a padded piece of the input, split by stride phase, in which every filter tap is one offset.
//
// Output pixel (p, q) of a tile reads tap (r, s) at padded row p·stride + r·dilation. Split the padded rows (columns)
// by their remainder modulo the stride: the tap then lies in the plane of remainder (r·dilation mod stride), at row
// p + (r·dilation div stride). So for all pixels of a tile a tap is the same distance away, whatever the stride,
// padding or dilation, and the kernels need no border cases.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arithmetic.h"
#include "params.h"

namespace vpns {

// One axis (rows or columns) of the planes.
struct PlaneAxis {
  std::vector<int> phases;        // the remainders that some tap uses
  std::vector<int> tap_phase;     // by tap: position of its remainder in `phases`
  std::vector<int> tap_distance;  // by tap: how many plane rows further
  int reach = 0;                  // the largest distance

  PlaneAxis(int64_t taps, int64_t stride, int64_t dilation) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int phase = static_cast<int>(tap * dilation % stride);
      const auto at = std::find(phases.begin(), phases.end(), phase);
      tap_phase.push_back(static_cast<int>(at - phases.begin()));
      if (at == phases.end()) phases.push_back(phase);
      tap_distance.push_back(static_cast<int>(tap * dilation / stride));
      reach = std::max(reach, tap_distance.back());
    }
  }
};

// The planes of a tile of `tile_p` × `tile_q` output pixels.
struct Planes {
  PlaneAxis h, w;
  int64_t tile_p, tile_q;
  int64_t rows, cols;  // of one phase's plane

  Planes(const ConvShape& s, int64_t tile_p_, int64_t tile_q_)
      : h(s.R, s.stride_h, s.dilation_h), w(s.S, s.stride_w, s.dilation_w), tile_p(tile_p_), tile_q(tile_q_),
        rows(tile_p_ + h.reach), cols(tile_q_ + w.reach) {}

  int64_t plane_count() const { return static_cast<int64_t>(h.phases.size() * w.phases.size()); }
  int64_t pixels() const { return plane_count() * rows * cols; }

  // Distance, in pixels of the planes, from output pixel (0, 0) to its tap (r, s).
  int64_t tap(int64_t r, int64_t s) const {
    const int64_t plane = h.tap_phase[r] * static_cast<int64_t>(w.phases.size()) + w.tap_phase[s];
    return (plane * rows + h.tap_distance[r]) * cols + w.tap_distance[s];
  }
};

// By tap (r · S + s): 0xff where an output pixel reads the input through it, else 0. The others see padding alone, as
// eight of nine taps do where a 3×3 filter meets a single pixel.
inline std::vector<uint8_t> reaching_taps(const ConvShape& s) {
  const auto reaches = [](int64_t inputs, int64_t outputs, int64_t stride, int64_t before) {
    const int64_t first = before < 0 ? ceil_div(-before, stride) : 0;  // output that reads no row before the first
    return first < outputs && first * stride + before < inputs;
  };
  std::vector<uint8_t> taps;
  for (int64_t r = 0; r < s.R; ++r)
    for (int64_t c = 0; c < s.S; ++c)
      taps.push_back(reaches(s.H, s.P, s.stride_h, r * s.dilation_h - s.pad_h) &&
                             reaches(s.W, s.Q, s.stride_w, c * s.dilation_w - s.pad_w)
                         ? 0xff
                         : 0);
  return taps;
}

// Cut `extent` into equal pieces of at most `most`: the size of a piece.
inline int64_t even_tile(int64_t extent, int64_t most) {
  if (extent <= 0) return 1;
  const int64_t pieces = ceil_div(extent, std::max<int64_t>(most, 1));
  return ceil_div(extent, pieces);
}

}  // namespace vpns
