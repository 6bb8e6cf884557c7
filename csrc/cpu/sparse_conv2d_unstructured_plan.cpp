// Prepares unstructured weights for the index-driven kernels: lanes, tiles, tap offsets, entries by block and chunk.
#include <algorithm>
#include <limits>
#include <utility>

#include "arithmetic.h"
#include "cpu/isa.h"
#include "cpu/sparse_conv2d_unstructured.h"

namespace vpns {
namespace {

// The planes of a tile may fill this share of the second-level cache, from where chunks reach the first.
constexpr double kPlaneShare = 0.7;
// A chunk may be this much larger than the first-level cache: sums that pass it more often cost more than misses.
constexpr double kChunkShare = 1.2;

// What a patch costs in cycles, roughly, with segments of one size.
struct Cut {
  int64_t rows = 1, cols = 1, chunk = 1;
  double cycles = std::numeric_limits<double>::infinity();
};

Cut cut_patch(const ConvShape& s, const UnstructuredVectors& v, int64_t patch_p, int64_t patch_q, double entries) {
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups;
  Cut best;
  for (int64_t rows = 1; rows <= std::min<int64_t>(kMaxSegmentRows, patch_p); ++rows)
    for (int64_t cols = 1; cols <= std::min<int64_t>(v.most / rows, patch_q); ++cols) {
      const int64_t touched = Planes(s, rows, cols).pixels() * v.lanes * v.lane_bytes;
      const int64_t most = std::min(static_cast<int64_t>(l1_cache_bytes() * kChunkShare) / touched,
                                    v.chunk_weights / (s.R * s.S));
      const int64_t chunks = ceil_div(channels, std::clamp<int64_t>(most, 1, channels));
      const double vectors = patch_p * patch_q, segments = ceil_div(patch_p, rows) * ceil_div(patch_q, cols);
      // A weight: a multiply-add per vector and its broadcast. A run: sums in and out, and a loop that ends.
      const double cycles =
          entries * (vectors + 2.5 * segments) + static_cast<double>(filters * chunks) * (3 * vectors + 15 * segments);
      if (cycles < best.cycles) best = {rows, cols, ceil_div(channels, chunks), cycles};
    }
  return best;
}

Lanes make_lanes(const ConvShape& s, int count, int images) {
  Lanes lanes{count, images, 1, 1, s.P, s.Q};
  // Halve the longer side until the lanes are full.
  for (int left = count / images; left > 1; left /= 2) {
    if (lanes.patch_q > lanes.patch_p) lanes.patches_w *= 2;
    else lanes.patches_h *= 2;
    lanes.patch_p = ceil_div(s.P, lanes.patches_h);
    lanes.patch_q = ceil_div(s.Q, lanes.patches_w);
  }
  return lanes;
}

double entries_per_group(const ConvShape& s, const SparseWeights& weights) {
  return static_cast<double>(weights.count) / static_cast<double>(s.groups);
}

// The cheapest way to fill lanes with `images` images.
Lanes choose_lanes(const ConvShape& s, const UnstructuredVectors& v, int64_t images, double entries) {
  Lanes best{};
  double least = std::numeric_limits<double>::infinity();
  for (int per_vector = v.lanes; per_vector >= 1; per_vector /= 2) {
    const Lanes lanes = make_lanes(s, v.lanes, per_vector);
    const double cycles = static_cast<double>(ceil_div(images, per_vector)) *
                          cut_patch(s, v, lanes.patch_p, lanes.patch_q, entries).cycles;
    if (cycles < least) {
      least = cycles;
      best = lanes;
    }
  }
  return best;
}

// Blocks of output channels in a group.
int64_t wanted_blocks(const ConvShape& s) { return ceil_div(s.K / s.groups, kMaxBlockFilters); }

// Cycles that a tile costs, roughly: to lay out, and to multiply.
struct TileCost {
  double layout, products;
};

// Of all tiles on so many threads, as run_typed shares them out.
double cost_of_tiles(int64_t tiles, const TileCost& tile, int64_t threads, int64_t blocks) {
  const int64_t left = tiles % threads;
  const double whole = static_cast<double>(tiles / threads) * (tile.layout + tile.products);
  if (left == 0) return whole;
  const int64_t parts = parts_of_left(left, threads, blocks);
  const double part = tile.layout + tile.products / static_cast<double>(parts);
  return whole + static_cast<double>(ceil_div(left * parts, threads)) * part;
}

// The tile of whole segments whose planes fit the cache that costs least: by its halo, and by what threads wait for one
// another. A gradient is summed up by tiles, so that its tiles may not depend on the threads.
Planes choose_tile(const ConvShape& s, const UnstructuredVectors& v, const Lanes& lanes, const Cut& cut, double entries,
                   int64_t images, int64_t threads) {
  // Of a vector, against one multiply-add.
  constexpr double kLayoutCycles = 16;
  const int64_t channels = s.C / s.groups, most_bytes = static_cast<int64_t>(l2_cache_bytes() * kPlaneShare);
  const int64_t beside = v.has_gradient ? s.K / s.groups : 0;  // output channels that lie beside the planes
  int64_t best_p = std::min(cut.rows, lanes.patch_p), best_q = std::min(cut.cols, lanes.patch_q);
  double least = std::numeric_limits<double>::infinity();
  for (int64_t p = cut.rows; p < lanes.patch_p + cut.rows; p += cut.rows)
    for (int64_t q = cut.cols; q < lanes.patch_q + cut.cols; q += cut.cols) {
      const int64_t tile_p = std::min(p, lanes.patch_p), tile_q = std::min(q, lanes.patch_q);
      const Planes planes(s, tile_p, tile_q);
      if ((planes.pixels() * channels + tile_p * tile_q * beside) * v.lanes * v.lane_bytes > most_bytes) break;
      const int64_t tiles = ceil_div(lanes.patch_p, tile_p) * ceil_div(lanes.patch_q, tile_q);
      const double laid_out = static_cast<double>(planes.pixels() * channels) * kLayoutCycles;
      const TileCost cost{laid_out, static_cast<double>(tile_p * tile_q) * entries};
      const double cycles = v.has_gradient ? static_cast<double>(tiles) * laid_out
                                           : cost_of_tiles(tiles * s.groups * ceil_div(images, lanes.images), cost,
                                                           threads, wanted_blocks(s));
      if (cycles < least) {
        least = cycles;
        best_p = tile_p;
        best_q = tile_q;
      }
    }
  return Planes(s, best_p, best_q);
}

// Output channels in blocks of about equally many kept weights.
std::vector<int64_t> make_blocks(const ConvShape& s, const SparseWeights& weights) {
  const int64_t filters = s.K / s.groups;
  std::vector<int64_t> blocks(1, 0);
  // A row also costs what its sums cost: as much as a few weights.
  const auto cost = [&](int64_t k) {
    int64_t kept = 0;
    for (int64_t g = 0; g < s.groups; ++g)
      kept += weights.indptr[g * filters + k + 1] - weights.indptr[g * filters + k];
    return kept + 8 * s.groups;
  };
  int64_t total = 0;
  for (int64_t k = 0; k < filters; ++k) total += cost(k);
  const int64_t wanted = wanted_blocks(s);
  int64_t sum = 0;
  for (int64_t k = 0; k < filters; ++k) {
    sum += cost(k);
    const bool full = k + 1 - blocks.back() == kMaxBlockFilters;
    const bool share = sum * wanted >= total * static_cast<int64_t>(blocks.size());
    if (full || share || k + 1 == filters) blocks.push_back(k + 1);
  }
  return blocks;
}

void add_entries(UnstructuredPlan& plan, const SparseWeights& weights, int64_t chunk) {
  const ConvShape& s = plan.shape;
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups, taps = s.R * s.S, chunks = plan.chunks;
  // Where in each row the chunks begin: indices ascend, channels outermost.
  std::vector<int32_t> bounds(s.K * (chunks + 1));
#pragma omp parallel for num_threads(weights.threads) schedule(static)
  for (int64_t k = 0; k < s.K; ++k) {
    int32_t at = weights.indptr[k];
    for (int64_t c = 0; c < chunks; ++c) {
      bounds[k * (chunks + 1) + c] = at;
      const int64_t end = std::min((c + 1) * chunk, channels) * taps;
      while (at < weights.indptr[k + 1] && weights.index[at] < end) ++at;
    }
    bounds[k * (chunks + 1) + chunks] = at;
  }
  // Calls found(run, its first packed weight) with those of a (group, block, chunk).
  const auto each_run = [&](int64_t segment, const auto& found) {
    const int64_t c = segment % chunks, block = segment / chunks % plan.block_count();
    const int64_t row = segment / chunks / plan.block_count() * filters;
    for (int64_t k = plan.blocks[block]; k < plan.blocks[block + 1]; ++k) {
      const int32_t* const bound = &bounds[(row + k) * (chunks + 1) + c];
      // The first chunk starts every sum.
      if (c == 0 || bound[1] > bound[0])
        found(Run{static_cast<int32_t>(k - plan.blocks[block]), bound[1] - bound[0]}, bound[0]);
    }
  };
  const int64_t segments = s.groups * plan.block_count() * chunks;
  plan.starts.assign(segments + 1, {0, 0});
  for (int64_t i = 0; i < segments; ++i) {
    plan.starts[i + 1] = plan.starts[i];
    each_run(i, [&](const Run& run, int32_t) {
      ++plan.starts[i + 1].run;
      plan.starts[i + 1].entry += run.count;
    });
  }
  plan.runs.resize(plan.starts.back().run);
  plan.offsets.resize(plan.starts.back().entry);
  plan.from.resize(plan.starts.back().entry);
  std::vector<int32_t> offset_of(channels * taps);
  for (int64_t flat = 0; flat < channels * taps; ++flat)
    offset_of[flat] = static_cast<int32_t>(
        flat / taps * plan.channel_stride + plan.planes.tap(flat % taps / s.S, flat % s.S) * plan.lanes.count);
#pragma omp parallel for num_threads(weights.threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < segments; ++i) {
    std::vector<std::pair<Run, int32_t>> found;  // and where its weights begin
    each_run(i, [&](const Run& run, int32_t first) { found.push_back({run, first}); });
    std::stable_sort(found.begin(), found.end(),
                     [](const auto& a, const auto& b) { return a.first.count < b.first.count; });
    Run* to_run = plan.runs.data() + plan.starts[i].run;
    int64_t to = plan.starts[i].entry;
    for (const auto& [run, first] : found) {
      *to_run++ = run;
      for (int32_t from = first; from < first + run.count; ++from, ++to) {
        plan.offsets[to] = offset_of[weights.index[from]];
        plan.from[to] = from;
      }
    }
  }
}

UnstructuredPlan make_plan(const ConvShape& s, const SparseWeights& weights, const UnstructuredVectors& v,
                           const Lanes& lanes, int64_t images) {
  const double entries = entries_per_group(s, weights);
  const Cut cut = cut_patch(s, v, lanes.patch_p, lanes.patch_q, entries);
  const Planes planes = choose_tile(s, v, lanes, cut, entries, images, weights.threads);
  const int64_t chunks = ceil_div(s.C / s.groups, cut.chunk);
  UnstructuredPlan plan{s, lanes, planes, cut.rows, cut.cols, 0, chunks, {}, {}, {}, {}, {}};
  // An odd number of cache lines, so that channels spread over the cache's sets.
  const int64_t line = 64 / v.lane_bytes;
  plan.channel_stride = (ceil_div(plan.planes.pixels() * v.lanes, line) | 1) * line;
  plan.blocks = make_blocks(s, weights);
  add_entries(plan, weights, cut.chunk);
  return plan;
}

}  // namespace

std::vector<UnstructuredPart> make_unstructured_parts(const ConvShape& s, const SparseWeights& weights,
                                                      const UnstructuredVectors& v) {
  const int64_t whole = s.N / v.lanes * v.lanes, rest = s.N - whole;
  std::vector<UnstructuredPart> parts;
  if (whole > 0) parts.push_back({make_plan(s, weights, v, make_lanes(s, v.lanes, v.lanes), whole), 0, whole});
  if (rest > 0)
    parts.push_back(
        {make_plan(s, weights, v, choose_lanes(s, v, rest, entries_per_group(s, weights)), rest), whole, rest});
  return parts;
}

}  // namespace vpns
