// The loop of sparse_conv2d_unstructured.h for one vector length; included by each instruction set's own file.
// Needs VPNS_MAX_SEGMENT and VPNS_RUN_UNSTRUCTURED (the name of the function that is defined). With VPNS_HALF_SUMS
// planes and the sums of a chunk are in fp16, twice as many to a vector; they join the other chunks' in float.

constexpr int kMaxSegment = VPNS_MAX_SEGMENT;
#ifdef VPNS_HALF_SUMS
using Plane = _Float16;
using PlaneVec = HalfVec;
constexpr int kParts = 2;  // vectors of floats to a vector of planes
inline PlaneVec broadcast_weight(float weight) { return half_broadcast(weight); }
// The bias joins in float.
inline PlaneVec start_sums(float) { return PlaneVec{}; }
inline Vec join_start(Vec sums, float start) { return sums + start; }
#else
using Plane = float;
using PlaneVec = Vec;
constexpr int kParts = 1;
inline PlaneVec broadcast_weight(float weight) { return broadcast(weight); }
inline PlaneVec start_sums(float start) { return broadcast(start); }
inline Vec join_start(Vec sums, float) { return sums; }
inline PlaneVec load_lanes(const float* from) { return load(from); }
inline PlaneVec multiply_add(PlaneVec a, PlaneVec b, PlaneVec sum) { return sum + a * b; }
inline Vec part_of(PlaneVec v, int) { return v; }
#endif
constexpr int kWide = kParts * kLanes;

// out[r][c] (+)= Σ weight · x[offset + r · pitch + c], all but `pitch` in vectors. A chunk is summed up before it joins
// the others: one sum over all kept weights would lose more to rounding.
template <int R, int C, bool kFirst>
void accumulate(const Plane* x, int64_t pitch, const int32_t* offset, const int32_t* end, const float* weights,
                float* out, float start) {
  const Plane* row[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r] = x + r * pitch;
    // Kept apart, or the compiler makes an address for each vector and runs out of registers.
    asm("" : "+r"(row[r]));
  }
  PlaneVec sum[R * C];
  // Unrolled before anything else, else the sums pass through the stack.
#pragma GCC unroll 32
  for (int t = 0; t < R * C; ++t) sum[t] = kFirst ? start_sums(start) : PlaneVec{};
  for (; offset != end; ++offset, ++weights) {
    const int64_t tap = *offset;
    const PlaneVec weight = broadcast_weight(*weights);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
      for (int c = 0; c < C; ++c)
        sum[r * C + c] = multiply_add(weight, load_lanes(row[r] + tap + c * kWide), sum[r * C + c]);
  }
#pragma GCC unroll 32
  for (int t = 0; t < R * C; ++t)
    for (int part = 0; part < kParts; ++part, out += kLanes)
      store(out, kFirst ? join_start(part_of(sum[t], part), start) : load(out) + part_of(sum[t], part));
}

using Accumulate = void (*)(const Plane*, int64_t, const int32_t*, const int32_t*, const float*, float*, float);

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

// All planes of a tile, one after the other.
template <typename X>
void load_planes(const UnstructuredPlan& plan, const ConvCall& call, const Tile& tile, Plane* to) {
  const ConvShape& s = plan.shape;
  const Lanes& lanes = plan.lanes;
  const Planes& planes = plan.planes;
  const int64_t channels = s.C / s.groups;
  for (int64_t at = 0; at < planes.plane_count() * planes.rows; ++at) {
    const int64_t plane = at / planes.rows, phases_w = static_cast<int64_t>(planes.w.phases.size());
    const int64_t phase_h = planes.h.phases[plane / phases_w], phase_w = planes.w.phases[plane % phases_w];
    const X* row[kWide];  // null: padding, or a lane without an image
    int64_t column[kWide];
    for (int lane = 0; lane < kWide; ++lane) {
      const int64_t a = lane / lanes.patches_w % lanes.patches_h, b = lane % lanes.patches_w;
      const int64_t n = tile.first_image + lane / lanes.patches_w / lanes.patches_h;
      const int64_t h = (a * lanes.patch_p + tile.p0 + at % planes.rows) * s.stride_h + phase_h - s.pad_h;
      column[lane] = (b * lanes.patch_q + tile.q0) * s.stride_w + phase_w - s.pad_w;
      row[lane] = n < tile.end_image && h >= 0 && h < s.H
                      ? static_cast<const X*>(call.x) + n * call.x_stride_n + h * call.x_stride_h + tile.g * channels
                      : nullptr;
    }
    for (int64_t col = 0; col < planes.cols; ++col) {
      const X* pixel[kWide];
      for (int lane = 0; lane < kWide; ++lane) {
        const int64_t w = column[lane] + col * s.stride_w;
        pixel[lane] = row[lane] != nullptr && w >= 0 && w < s.W ? row[lane] + w * call.x_stride_w : nullptr;
      }
      for (int lane = 0; lane < kWide; lane += kLanes)
        gather_lanes(pixel + lane, channels, to + (at * planes.cols + col) * kWide + lane, plan.channel_stride);
    }
  }
}

// A segment cut to its patch: patch pixels from (p, q) on.
struct Segment {
  int64_t p, q, rows, cols;
  int64_t floats() const { return rows * cols * kWide; }
};

// sums[filter of the block][row][column][lane]
void multiply(const UnstructuredPlan& plan, const float* weights, const Segment& segment, const Plane* x, int64_t g,
              int64_t block, const float* bias, float* sums) {
  const int64_t pitch = plan.planes.cols * kWide;
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const Accumulate run_entries =
        (chunk == 0 ? kAccumulateFirst : kAccumulateMore)[segment.rows - 1][segment.cols - 1];
    const RunStart* start = &plan.starts[(g * plan.block_count() + block) * plan.chunks + chunk];
    int64_t entry = start[0].entry;
    for (int64_t i = start[0].run; i < start[1].run; ++i) {
      const Run& run = plan.runs[i];
      const int32_t* const offset = plan.offsets.data() + entry;
      run_entries(x, pitch, offset, offset + run.count, weights + entry, sums + run.filter * segment.floats(),
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
      int64_t target[kWide];
      for (int lane = 0; lane < kWide; ++lane) {
        const int64_t p = lane / lanes.patches_w % lanes.patches_h * lanes.patch_p + segment.p + row;
        const int64_t q = lane % lanes.patches_w * lanes.patch_q + segment.q + col;
        const int64_t n = tile.first_image + lane / lanes.patches_w / lanes.patches_h;
        target[lane] = n < tile.end_image && p < s.P && q < s.Q ? call.y_at(s, n, p, q) + k0 : -1;
      }
      for (int lane = 0; lane < kWide; lane += kLanes)
        scatter_lanes(sums + (row * segment.cols + col) * kWide + lane, segment.floats(), count, out, target + lane);
    }
}

// All segments of a tile for one block of output channels.
template <typename Y>
void run_block(const UnstructuredPlan& plan, const float* weights, const ConvCall& call, const Tile& tile,
               int64_t block, const Plane* planes, float* sums, PhaseClock& clock) {
  const int64_t filters = plan.shape.K / plan.shape.groups;
  const int64_t k0 = tile.g * filters + plan.blocks[block], count = plan.blocks[block + 1] - plan.blocks[block];
  const float* bias = call.bias ? static_cast<const float*>(call.bias) + k0 : nullptr;
  const int64_t rows = std::min(plan.planes.tile_p, plan.lanes.patch_p - tile.p0);
  const int64_t cols = std::min(plan.planes.tile_q, plan.lanes.patch_q - tile.q0);
  for (int64_t p = 0; p < rows; p += plan.rows)
    for (int64_t q = 0; q < cols; q += plan.cols) {
      const Segment segment{tile.p0 + p, tile.q0 + q, std::min(plan.rows, rows - p), std::min(plan.cols, cols - q)};
      multiply(plan, weights, segment, planes + (p * plan.planes.cols + q) * kWide, tile.g, block, bias, sums);
      clock.ends(kProducts);
      store_segment<Y>(plan, call, tile, segment, k0, count, sums);
      clock.ends(kStores);
    }
}

template <typename X, typename Y>
void run_typed(const UnstructuredPart& part, const float* weights, const ConvCall& call) {
  const UnstructuredPlan& plan = part.plan;
  const int64_t first_image = part.first_image, images = part.images;
  const ConvShape& s = plan.shape;
  const int64_t tiles_p = ceil_div(plan.lanes.patch_p, plan.planes.tile_p);
  const int64_t tiles_q = ceil_div(plan.lanes.patch_q, plan.planes.tile_q);
  const int64_t tiles = ceil_div(images, plan.lanes.images) * s.groups * tiles_p * tiles_q;
  const auto tile_at = [&](int64_t number) {
    const int64_t q = number % tiles_q, p = number / tiles_q % tiles_p, rest = number / tiles_q / tiles_p;
    const int64_t n = first_image + rest / s.groups * plan.lanes.images;
    return Tile{n, first_image + images, rest % s.groups, p * plan.planes.tile_p, q * plan.planes.tile_q};
  };
  const int64_t tile_planes = s.C / s.groups * plan.channel_stride;
  const int64_t tile_floats = tile_planes * static_cast<int64_t>(sizeof(Plane)) / 4;
  const int64_t sum_floats = kMaxBlockFilters * kMaxSegment * kWide;
  const int64_t blocks = plan.block_count();
  // Tiles that are too few for all threads are tasks of some blocks of output channels. Each thread lays such a tile
  // out for itself: to fetch what another core has just written takes longer.
  const int64_t left = tiles % call.threads, whole = tiles - left;
  const int64_t parts = parts_of_left(left, call.threads, blocks);
  TaskQueue tasks(whole, left * parts, call.threads);
#pragma omp parallel num_threads(call.threads)
  {
    PhaseClock clock(call);
    float* const sums = thread_scratch(sum_floats + tile_floats);
    Plane* const planes = reinterpret_cast<Plane*>(sums + sum_floats);
    int64_t laid_out = -1;
    for (int64_t task; (task = tasks.take(omp_get_thread_num())) >= 0;) {
      const bool is_whole = task < whole;
      const int64_t number = is_whole ? task : whole + (task - whole) / parts;
      const int64_t part = is_whole ? 0 : (task - whole) % parts, shares = is_whole ? 1 : parts;
      const Tile tile = tile_at(number);
      if (number != laid_out) load_planes<X>(plan, call, tile, planes);
      laid_out = number;
      clock.ends(kLayout);
      for (int64_t block = blocks * part / shares; block < blocks * (part + 1) / shares; ++block)
        run_block<Y>(plan, weights, call, tile, block, planes, sums, clock);
    }
  }
}

}  // namespace

void VPNS_RUN_UNSTRUCTURED(const UnstructuredPart& part, const float* weights, const ConvCall& call) {
  with_types(call, [&](auto x, auto y) { run_typed<decltype(x), decltype(y)>(part, weights, call); });
}

namespace {
