// Prepares unstructured weights for the index-driven kernels: tile sizes, tap offsets, entries by chunk.
#include "cpu/sparse_conv2d_unstructured.h"

#include <algorithm>
#include <memory>
#include <optional>

#include "cpu/kernels.h"
#include "cpu/sparse_conv2d.h"

namespace vpns {
namespace {

// The planes of a tile stay within this many bytes: about the second-level cache, so that chunks reach the first level
// from there.
constexpr int64_t kPlaneBytes = 768 * 1024;
// A chunk may fill this share of the first-level cache; the rest holds entries and sums.
constexpr double kChunkShare = 0.75;

std::vector<Segment> make_segments(const Planes& planes, bool images_in_lanes, int lanes, int most) {
  std::vector<Segment> segments;
  if (images_in_lanes) {
    const int64_t size = even_tile(planes.tile_q, most);
    for (int64_t p = 0; p < planes.tile_p; ++p)
      for (int64_t q = 0; q < planes.tile_q; q += size) {
        const int64_t first = p * planes.cols + q;
        segments.push_back({static_cast<int32_t>(first * lanes),
                            static_cast<int32_t>(std::min(size, planes.tile_q - q)), static_cast<int32_t>(first)});
      }
    return segments;
  }
  // Pixels in lanes: run over the whole tile, the columns between two rows included.
  const int64_t flat = (planes.tile_p - 1) * planes.cols + planes.tile_q;
  const int64_t vectors = ceil_div(flat, lanes), size = even_tile(vectors, most);
  for (int64_t v = 0; v < vectors; v += size)
    segments.push_back({static_cast<int32_t>(v * lanes), static_cast<int32_t>(std::min(size, vectors - v)),
                        static_cast<int32_t>(v * lanes)});
  return segments;
}

UnstructuredPlan make_plan(const ConvShape& s, const SparseWeights& weights, bool images_in_lanes, int lanes,
                           int most) {
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups, taps = s.R * s.S;
  const int64_t width = images_in_lanes ? lanes : 1;
  // One segment spans a row where images fill the lanes; else a tile is as wide as the image.
  const int64_t tile_q = images_in_lanes ? even_tile(s.Q, most) : s.Q;
  int64_t tile_p = s.P;
  const auto bytes = [&](int64_t rows) { return channels * Planes(s, rows, tile_q).pixels() * width * 4; };
  while (tile_p > 1 && bytes(tile_p) > kPlaneBytes) tile_p = even_tile(s.P, tile_p - 1);
  UnstructuredPlan plan{s, images_in_lanes, lanes, Planes(s, tile_p, tile_q), 0, 0, 0, {}, {}, {}};
  plan.segments = make_segments(plan.planes, images_in_lanes, lanes, most);
  // Room for the last vector to overrun; an odd number of cache lines, so that channels spread over the cache's sets.
  const int64_t lines = ceil_div(plan.planes.pixels() * width + lanes, 16);
  plan.channel_stride = (lines | 1) * 16;
  const int64_t segment_floats = plan.segments[0].vectors * lanes + (s.S > 1 ? plan.planes.w.reach * width : 0);
  const int64_t touched = segment_floats * 4 * s.R * static_cast<int64_t>(plan.planes.w.phases.size());
  plan.chunk = std::clamp<int64_t>(static_cast<int64_t>(l1_cache_bytes() * kChunkShare) / touched, 1, channels);
  plan.chunks = ceil_div(channels, plan.chunk);
  plan.chunk = ceil_div(channels, plan.chunks);

  plan.entries.reserve(weights.count);
  plan.starts.reserve(s.groups * plan.chunks * (filters + 1));
  for (int64_t g = 0; g < s.groups; ++g) {
    // Where in each row the next chunk begins: indices ascend, channels outermost.
    std::vector<int32_t> next(weights.indptr + g * filters, weights.indptr + (g + 1) * filters);
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t end = std::min((chunk + 1) * plan.chunk, channels) * taps;
      for (int64_t k = 0; k < filters; ++k) {
        plan.starts.push_back(static_cast<int64_t>(plan.entries.size()));
        const int32_t row_end = weights.indptr[g * filters + k + 1];
        for (; next[k] < row_end && weights.index[next[k]] < end; ++next[k]) {
          const int64_t flat = weights.index[next[k]], c = flat / taps, r = flat % taps / s.S, col = flat % s.S;
          const int64_t offset = c * plan.channel_stride + plan.planes.tap(r, col) * width;
          plan.entries.push_back({static_cast<int32_t>(offset), weight_at(weights, next[k])});
        }
      }
      plan.starts.push_back(static_cast<int64_t>(plan.entries.size()));
    }
  }
  return plan;
}

class PreparedUnstructured final : public PreparedConv {
 public:
  PreparedUnstructured(const ConvShape& s, const SparseWeights& weights, int lanes, int most, RunUnstructured run)
      : shape_(s), lanes_(lanes), run_(run) {
    if (s.N >= lanes) by_image_.emplace(make_plan(s, weights, true, lanes, most));
    if (s.N % lanes != 0) by_pixel_.emplace(make_plan(s, weights, false, lanes, most));
  }

  void run(const ConvCall& call) const override {
    const int64_t whole = shape_.N / lanes_ * lanes_;
    if (by_image_) run_(*by_image_, call, 0, whole);
    if (by_pixel_) run_(*by_pixel_, call, whole, shape_.N - whole);
  }

 private:
  ConvShape shape_;
  int lanes_;
  RunUnstructured run_;
  std::optional<UnstructuredPlan> by_image_;  // whole groups of lanes
  std::optional<UnstructuredPlan> by_pixel_;  // the images left over
};

template <int kLanes, int kMost, RunUnstructured kRun>
std::unique_ptr<PreparedConv> prepare(const ConvShape& s, const SparseWeights& weights) {
  return std::make_unique<PreparedUnstructured>(s, weights, kLanes, kMost, kRun);
}

std::string why_not(const ConvShape& s, const SparseWeights& weights, DType x_dtype) {
  if (weights.format != Format::kUnstructured) return "it takes unstructured weights";
  if (weights.dtype == DType::kF64 || x_dtype == DType::kF64) return "it computes in float32";
  const Planes planes(s, 1, s.Q);
  if (s.C / s.groups * (planes.pixels() + 32) * 16 > INT32_MAX) return "a row of the input is too large for 32-bit offsets";
  return {};
}

}  // namespace

void add_unstructured_kernels(std::vector<SparseConvKernel>& table) {
#if defined(VPNS_WITH_AVX512)
  table.push_back({"unstructured_avx512", Isa::kAvx512, false, why_not,
                   prepare<16, kMaxSegmentAvx512, run_unstructured_avx512>});
#endif
#if defined(VPNS_WITH_AVX2)
  table.push_back({"unstructured_avx2", Isa::kAvx2, false, why_not, prepare<8, kMaxSegmentAvx2, run_unstructured_avx2>});
  table.push_back({"unstructured_avx512_emulated", Isa::kAvx2, true, why_not,
                   prepare<16, kMaxSegmentAvx512, run_unstructured_avx512_emulated>});
#endif
}

}  // namespace vpns
