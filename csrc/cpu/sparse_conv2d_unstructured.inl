// The loop of sparse_conv2d_unstructured.h for one vector length; included by each instruction set's own file.
// Needs VPNS_LANES, VPNS_MAX_SEGMENT and VPNS_RUN_UNSTRUCTURED (the name of the function that is defined).

constexpr int kMaxSegment = VPNS_MAX_SEGMENT;

// out[r][c] (+)= Σ weight · x[offset + r · pitch + c], all but `pitch` in vectors. A chunk is summed up before it joins the
// others: one sum over all kept weights would lose more to rounding.
template <int R, int C, bool kFirst>
void accumulate(const float* x, int64_t pitch, const TapEntry* entry, const TapEntry* end, float* out, float start) {
  const float* row[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r] = x + r * pitch;
    // Kept apart, or the compiler makes an address for each vector and runs out of registers.
    asm("" : "+r"(row[r]));
  }
  Vec sum[R * C];
  // Unrolled before anything else, else the sums pass through the stack.
#pragma GCC unroll 32
  for (int t = 0; t < R * C; ++t) sum[t] = broadcast(kFirst ? start : 0.0f);
  for (; entry != end; ++entry) {
    const int64_t tap = entry->offset;
    const Vec weight = broadcast(entry->weight);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
      for (int c = 0; c < C; ++c) sum[r * C + c] += weight * load(row[r] + tap + c * kLanes);
  }
#pragma GCC unroll 32
  for (int t = 0; t < R * C; ++t) store(out + t * kLanes, kFirst ? sum[t] : load(out + t * kLanes) + sum[t]);
}

using Accumulate = void (*)(const float*, int64_t, const TapEntry*, const TapEntry*, float*, float);

template <int R, bool kFirst, int... C>
constexpr std::array<Accumulate, kMaxSegment> accumulate_row(std::integer_sequence<int, C...>) {
  return {accumulate<R, C + 1, kFirst>...};
}
template <bool kFirst, int... R>
constexpr std::array<std::array<Accumulate, kMaxSegment>, kMaxSegmentRows> accumulate_table(
    std::integer_sequence<int, R...>) {
  return {accumulate_row<R + 1, kFirst>(std::make_integer_sequence<int, kMaxSegment / (R + 1)>{})...};
}
// By rows - 1 and columns - 1.
constexpr auto kAccumulateFirst = accumulate_table<true>(std::make_integer_sequence<int, kMaxSegmentRows>{});
constexpr auto kAccumulateMore = accumulate_table<false>(std::make_integer_sequence<int, kMaxSegmentRows>{});

// A tile of one group of images and one group of channels: patch pixels from (p0, q0) on.
struct Tile {
  int64_t first_image, end_image, g, p0, q0;
};

// Rows [begin, end) of all planes of a tile, counted over the planes one after the other.
template <typename X>
void load_planes(const UnstructuredPlan& plan, const ConvCall& call, const Tile& tile, int64_t begin, int64_t end,
                 float* to) {
  const ConvShape& s = plan.shape;
  const Lanes& lanes = plan.lanes;
  const Planes& planes = plan.planes;
  const int64_t channels = s.C / s.groups;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t plane = at / planes.rows, phases_w = static_cast<int64_t>(planes.w.phases.size());
    const int64_t phase_h = planes.h.phases[plane / phases_w], phase_w = planes.w.phases[plane % phases_w];
    const X* row[kLanes];  // null: padding, or a lane without an image
    int64_t column[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t a = lane / lanes.patches_w % lanes.patches_h, b = lane % lanes.patches_w;
      const int64_t n = tile.first_image + lane / lanes.patches_w / lanes.patches_h;
      const int64_t h = (a * lanes.patch_p + tile.p0 + at % planes.rows) * s.stride_h + phase_h - s.pad_h;
      column[lane] = (b * lanes.patch_q + tile.q0) * s.stride_w + phase_w - s.pad_w;
      row[lane] = n < tile.end_image && h >= 0 && h < s.H
                      ? static_cast<const X*>(call.x) + n * call.x_stride_n + h * call.x_stride_h + tile.g * channels
                      : nullptr;
    }
    for (int64_t col = 0; col < planes.cols; ++col) {
      const X* pixel[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t w = column[lane] + col * s.stride_w;
        pixel[lane] = row[lane] != nullptr && w >= 0 && w < s.W ? row[lane] + w * call.x_stride_w : nullptr;
      }
      gather_lanes(pixel, channels, to + (at * planes.cols + col) * kLanes, plan.channel_stride);
    }
  }
}

// A segment cut to its patch: patch pixels from (p, q) on.
struct Segment {
  int64_t p, q, rows, cols;
  int64_t floats() const { return rows * cols * kLanes; }
};

// sums[filter of the block][row][column][lane]
void multiply(const UnstructuredPlan& plan, const Segment& segment, const float* x, int64_t g, int64_t block,
              const float* bias, float* sums) {
  const int64_t pitch = plan.planes.cols * kLanes;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const Accumulate run_entries =
        (chunk == 0 ? kAccumulateFirst : kAccumulateMore)[segment.rows - 1][segment.cols - 1];
    const RunStart* start = &plan.starts[(g * plan.block_count() + block) * plan.chunks + chunk];
    const TapEntry* entry = plan.entries.data() + start[0].entry;
    for (int64_t i = start[0].run; i < start[1].run; ++i) {
      const Run& run = plan.runs[i];
      run_entries(x, pitch, entry, entry + run.count, sums + run.filter * segment.floats(),
                  bias ? bias[run.filter] : 0.0f);
      entry += run.count;
    }
  }
}

template <typename Y>
void store_segment(const UnstructuredPlan& plan, const ConvCall& call, const Tile& tile, const Segment& segment,
                   int64_t k0, int64_t count, const float* sums) {
  const ConvShape& s = plan.shape;
  const Lanes& lanes = plan.lanes;
  const Output<Y> out(call);
  for (int64_t row = 0; row < segment.rows; ++row)
    for (int64_t col = 0; col < segment.cols; ++col) {
      int64_t target[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t p = lane / lanes.patches_w % lanes.patches_h * lanes.patch_p + segment.p + row;
        const int64_t q = lane % lanes.patches_w * lanes.patch_q + segment.q + col;
        const int64_t n = tile.first_image + lane / lanes.patches_w / lanes.patches_h;
        target[lane] = n < tile.end_image && p < s.P && q < s.Q ? ((n * s.P + p) * s.Q + q) * s.K + k0 : -1;
      }
      scatter_lanes(sums + (row * segment.cols + col) * kLanes, segment.floats(), count, out, target);
    }
}

// All segments of a tile for one block of output channels.
template <typename Y>
void run_block(const UnstructuredPlan& plan, const ConvCall& call, const Tile& tile, int64_t block, const float* planes,
               float* sums, PhaseClock& clock) {
  const int64_t filters = plan.shape.K / plan.shape.groups;
  const int64_t k0 = tile.g * filters + plan.blocks[block], count = plan.blocks[block + 1] - plan.blocks[block];
  const float* bias = call.bias ? static_cast<const float*>(call.bias) + k0 : nullptr;
  const int64_t rows = std::min(plan.planes.tile_p, plan.lanes.patch_p - tile.p0);
  const int64_t cols = std::min(plan.planes.tile_q, plan.lanes.patch_q - tile.q0);
  for (int64_t p = 0; p < rows; p += plan.rows)
    for (int64_t q = 0; q < cols; q += plan.cols) {
      const Segment segment{tile.p0 + p, tile.q0 + q, std::min(plan.rows, rows - p), std::min(plan.cols, cols - q)};
      multiply(plan, segment, planes + (p * plan.planes.cols + q) * kLanes, tile.g, block, bias, sums);
      clock.ends(kProducts);
      store_segment<Y>(plan, call, tile, segment, k0, count, sums);
      clock.ends(kStores);
    }
}

template <typename X, typename Y>
void run_typed(const UnstructuredPlan& plan, const ConvCall& call, int64_t first_image, int64_t images) {
  const ConvShape& s = plan.shape;
  const int64_t tiles_p = ceil_div(plan.lanes.patch_p, plan.planes.tile_p);
  const int64_t tiles_q = ceil_div(plan.lanes.patch_q, plan.planes.tile_q);
  const int64_t tiles = ceil_div(images, plan.lanes.images) * s.groups * tiles_p * tiles_q;
  const auto tile_at = [&](int64_t number) {
    const int64_t q = number % tiles_q, p = number / tiles_q % tiles_p, rest = number / tiles_q / tiles_p;
    const int64_t n = first_image + rest / s.groups * plan.lanes.images;
    return Tile{n, first_image + images, rest % s.groups, p * plan.planes.tile_p, q * plan.planes.tile_q};
  };
  const int64_t tile_floats = s.C / s.groups * plan.channel_stride;
  const int64_t sum_floats = kMaxBlockFilters * kMaxSegment * kLanes;
  const int64_t plane_rows = plan.planes.plane_count() * plan.planes.rows, blocks = plan.block_count();
  // Too few tiles to keep every thread busy: they lay out all of them together, then share out the output channels too.
  const bool together = call.threads > 1 && tiles < 4 * call.threads;
  float* const shared = together ? thread_scratch(tiles * tile_floats + sum_floats) : nullptr;
#pragma omp parallel num_threads(call.threads)
  {
    PhaseClock clock(call);
    if (together) {
      float* const sums = omp_get_thread_num() == 0 ? shared + tiles * tile_floats : thread_scratch(sum_floats);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tiles * plane_rows; ++i)
        load_planes<X>(plan, call, tile_at(i / plane_rows), i % plane_rows, i % plane_rows + 1,
                       shared + i / plane_rows * tile_floats);
      clock.ends(kLayout);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < tiles * blocks; ++i)
        run_block<Y>(plan, call, tile_at(i / blocks), i % blocks, shared + i / blocks * tile_floats, sums, clock);
    } else {
      float* const planes = thread_scratch(tile_floats + sum_floats);
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t i = 0; i < tiles; ++i) {
        load_planes<X>(plan, call, tile_at(i), 0, plane_rows, planes);
        clock.ends(kLayout);
        for (int64_t block = 0; block < blocks; ++block)
          run_block<Y>(plan, call, tile_at(i), block, planes, planes + tile_floats, clock);
      }
    }
  }
}

}  // namespace

void VPNS_RUN_UNSTRUCTURED(const UnstructuredPlan& plan, const ConvCall& call, int64_t first_image, int64_t images) {
  with_types(call, [&](auto x, auto y) { run_typed<decltype(x), decltype(y)>(plan, call, first_image, images); });
}

namespace {
