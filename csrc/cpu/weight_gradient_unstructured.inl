// The loops of weight_gradient_unstructured.h for one vector length; included by each instruction set's own file, after
// sparse_conv2d_unstructured.inl. Needs VPNS_MAX_GRAD_SEGMENT and VPNS_RUN_UNSTRUCTURED_GRAD (the function's name).

constexpr int kMaxGradSegment = VPNS_MAX_GRAD_SEGMENT;
// Sums that wait to be added up over their lanes: a run's, and what was left of those before.
constexpr int64_t kWaiting = kMaxChunkWeights + kLanes;

// Lanes of E sums: out[e] = Σ over the segment of dy · x[offset[e] + r · pitch + c].
template <int R, int C, int E>
inline void sum_entries(const float* const* row, const Vec* dy, const int32_t* offset, float* out) {
  int64_t tap[E];
  Vec sum[E];
#pragma GCC unroll 4
  for (int e = 0; e < E; ++e) {
    tap[e] = offset[e];
    sum[e] = Vec{};
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 32
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 4
      for (int e = 0; e < E; ++e) sum[e] += dy[r * C + c] * load(row[r] + tap[e] + c * kLanes);
#pragma GCC unroll 4
  for (int e = 0; e < E; ++e) store(out + e * kLanes, sum[e]);
}

// Lanes of the sums of all entries of a run.
template <int R, int C>
void sum_run(const float* x, int64_t pitch, const int32_t* offset, int64_t count, const float* dy, int64_t dy_pitch,
             float* out) {
  const float* row[R];
  Vec held[R * C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r] = x + r * pitch;
    // Kept apart, or the compiler makes an address for each vector and runs out of registers.
    asm("" : "+r"(row[r]));
#pragma GCC unroll 32
    for (int c = 0; c < C; ++c) held[r * C + c] = load(dy + r * dy_pitch + c * kLanes);
  }
  const int32_t* const end = offset + count;
  for (; end - offset >= kGradEntries; offset += kGradEntries, out += kGradEntries * kLanes)
    sum_entries<R, C, kGradEntries>(row, held, offset, out);
  const int64_t left = end - offset;
  if (left == 3) sum_entries<R, C, 3>(row, held, offset, out);
  else if (left == 2) sum_entries<R, C, 2>(row, held, offset, out);
  else if (left == 1) sum_entries<R, C, 1>(row, held, offset, out);
}

using SumRun = void (*)(const float*, int64_t, const int32_t*, int64_t, const float*, int64_t, float*);
template <int R, int... C>
constexpr std::array<SumRun, kMaxGradSegment> sum_run_row(std::integer_sequence<int, C...>) {
  return {sum_run<R, C + 1>...};
}
template <int... R>
constexpr std::array<std::array<SumRun, kMaxGradSegment>, kMaxSegmentRows> sum_run_table(
    std::integer_sequence<int, R...>) {
  return {sum_run_row<R + 1>(std::make_integer_sequence<int, kMaxGradSegment / (R + 1)>{})...};
}
// By rows - 1 and columns - 1.
constexpr auto kSumRun = sum_run_table(std::make_integer_sequence<int, kMaxSegmentRows>{});

template <int kStep>
inline void fold(Vec r[kLanes]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * kStep)
    r[i] = interleave<kStep, false>(r[i], r[i + kStep], kAll) + interleave<kStep, true>(r[i], r[i + kStep], kAll);
}

// to[i] += Σ over the lanes of from[i], for kLanes sums. Two vectors are folded into one, each into every other pair of
// lanes, until one is left, whose lane i is the total of vector i.
inline void add_up_lanes(const float* from, float* to) {
  Vec r[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) r[i] = load(from + i * kLanes);
  fold<1>(r);
  fold<2>(r);
  fold<4>(r);
  if constexpr (kLanes > 8) fold<8>(r);
  store(to, load(to) + r[0]);
}

// sums[entry] += over a segment of a tile, for a block of output channels.
void add_segment(const UnstructuredGradPart& own, const Segment& segment, const float* x, const float* dy, int64_t g,
                 int64_t block, float* waiting, float* sums) {
  const UnstructuredPlan& plan = own.part.plan;
  const int64_t pitch = plan.planes.cols * kLanes, dy_pitch = plan.planes.tile_q * kLanes;
  const SumRun sum_run = kSumRun[segment.rows - 1][segment.cols - 1];
  const RunStart* start = &plan.starts[(g * plan.block_count() + block) * plan.chunks];
  int64_t entry = start[0].entry, done = entry;
  for (int64_t i = start[0].run; i < start[plan.chunks].run; ++i) {
    const Run& run = plan.runs[i];
    if (run.count == 0) continue;
    sum_run(x, pitch, &plan.offsets[entry], run.count, dy + run.filter * own.filter_stride, dy_pitch,
            waiting + (entry - done) * kLanes);
    entry += run.count;
    int64_t from = 0;
    for (; entry - done >= kLanes; done += kLanes, from += kLanes) add_up_lanes(waiting + from * kLanes, sums + done);
    if (from > 0) std::memmove(waiting, waiting + from * kLanes, (entry - done) * kLanes * sizeof(float));
  }
  for (int64_t i = 0; done < entry; ++done, ++i) {
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += waiting[i * kLanes + lane];
    sums[done] += total;
  }
}

// dy of a tile as [k][pixel][lane]; zeros where a lane has no output.
template <typename X>
void load_output_gradient(const UnstructuredGradPart& own, const WeightGradCall& call, const Tile& tile, int64_t row,
                          float* to) {
  const UnstructuredPlan& plan = own.part.plan;
  const ConvShape& s = plan.shape;
  const Lanes& lanes = plan.lanes;
  const int64_t filters = s.K / s.groups;
  for (int64_t col = 0; col < plan.planes.tile_q; ++col) {
    const X* pixel[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t in_p = tile.p0 + row, in_q = tile.q0 + col;
      const int64_t p = lane / lanes.patches_w % lanes.patches_h * lanes.patch_p + in_p;
      const int64_t q = lane % lanes.patches_w * lanes.patch_q + in_q;
      const int64_t n = tile.first_image + lane / lanes.patches_w / lanes.patches_h;
      const bool has_output =
          n < tile.end_image && in_p < lanes.patch_p && in_q < lanes.patch_q && p < s.P && q < s.Q;
      pixel[lane] = has_output ? static_cast<const X*>(call.grad) + ((n * s.P + p) * s.Q + q) * s.K + tile.g * filters
                               : nullptr;
    }
    gather_lanes(pixel, filters, to + (row * plan.planes.tile_q + col) * kLanes, own.filter_stride);
  }
}

// All segments of a tile, for one block of output channels.
void add_tile(const UnstructuredGradPart& own, const Tile& tile, int64_t block, const float* planes, const float* dy,
              float* waiting, float* sums) {
  const UnstructuredPlan& plan = own.part.plan;
  const int64_t rows = std::min(plan.planes.tile_p, plan.lanes.patch_p - tile.p0);
  const int64_t cols = std::min(plan.planes.tile_q, plan.lanes.patch_q - tile.q0);
  for (int64_t p = 0; p < rows; p += plan.rows)
    for (int64_t q = 0; q < cols; q += plan.cols) {
      const Segment segment{tile.p0 + p, tile.q0 + q, std::min(plan.rows, rows - p), std::min(plan.cols, cols - q)};
      add_segment(own, segment, planes + (p * plan.planes.cols + q) * kLanes,
                  dy + plan.blocks[block] * own.filter_stride + (p * plan.planes.tile_q + q) * kLanes, tile.g, block,
                  waiting, sums);
    }
}

template <typename X>
void run_unstructured_grad(const UnstructuredGradPart& own, const WeightGradCall& call, bool is_first) {
  const UnstructuredPlan& plan = own.part.plan;
  const ConvShape& s = plan.shape;
  const ConvCall source{call.x, call.dtype, call.x_stride_n, call.x_stride_h, call.x_stride_w,
                        nullptr, call.dtype, nullptr, 1};
  const int64_t tiles_p = ceil_div(plan.lanes.patch_p, plan.planes.tile_p);
  const int64_t tiles_q = ceil_div(plan.lanes.patch_q, plan.planes.tile_q);
  const int64_t first_image = own.part.first_image, images = own.part.images;
  const auto tile_at = [&](int64_t number) {
    const int64_t q = number % tiles_q, p = number / tiles_q % tiles_p, rest = number / tiles_q / tiles_p;
    const int64_t n = first_image + rest / s.groups * plan.lanes.images;
    return Tile{n, first_image + images, rest % s.groups, p * plan.planes.tile_p, q * plan.planes.tile_q};
  };
  const int64_t entries = static_cast<int64_t>(plan.offsets.size()), blocks = plan.block_count(), pieces = own.pieces;
  const int64_t plane_floats = s.C / s.groups * plan.channel_stride, dy_floats = s.K / s.groups * own.filter_stride;
  std::vector<float> sums(pieces * entries, 0.0f);
  // Pieces that are too few for all threads are tasks of some blocks of output channels, as in the forward pass.
  const int64_t left = pieces % call.threads, whole = pieces - left, parts = parts_of_left(left, call.threads, blocks);
  const int64_t waiting_floats = kWaiting * kLanes;
  TaskQueue tasks(whole, left * parts, call.threads);
#pragma omp parallel num_threads(call.threads)
  {
    float* const waiting = thread_scratch(waiting_floats + plane_floats + dy_floats);
    float* const planes = waiting + waiting_floats;
    float* const dy = planes + plane_floats;
    for (int64_t task; (task = tasks.take(omp_get_thread_num())) >= 0;) {
      const bool is_whole = task < whole;
      const int64_t piece = is_whole ? task : whole + (task - whole) / parts;
      const int64_t part = is_whole ? 0 : (task - whole) % parts, shares = is_whole ? 1 : parts;
      for (int64_t number = own.tiles * piece / pieces; number < own.tiles * (piece + 1) / pieces; ++number) {
        const Tile tile = tile_at(number);
        load_planes<X>(plan, source, tile, planes);
        for (int64_t row = 0; row < plan.planes.tile_p; ++row) load_output_gradient<X>(own, call, tile, row, dy);
        for (int64_t block = blocks * part / shares; block < blocks * (part + 1) / shares; ++block)
          add_tile(own, tile, block, planes, dy, waiting, &sums[piece * entries]);
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < entries; ++i) {
      float total = is_first ? 0.0f : call.out[plan.from[i]];
      for (int64_t piece = 0; piece < pieces; ++piece) total += sums[piece * entries + i];
      call.out[plan.from[i]] = total;
    }
  }
}

}  // namespace

void VPNS_RUN_UNSTRUCTURED_GRAD(const UnstructuredGradPart& part, const WeightGradCall& call, bool is_first) {
  if (call.dtype == DType::kBF16) run_unstructured_grad<Bf16>(part, call, is_first);
  else if (call.dtype == DType::kF16) run_unstructured_grad<Fp16>(part, call, is_first);
  else run_unstructured_grad<float>(part, call, is_first);
}

namespace {
