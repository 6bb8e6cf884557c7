// The loop of sparse_conv2d_unstructured.h for one vector length; included by each instruction set's own file.
// Needs VPNS_LANES, VPNS_MAX_SEGMENT and VPNS_RUN_UNSTRUCTURED (the name of the function that is defined).

constexpr int kMaxSegment = VPNS_MAX_SEGMENT;

// out[t] (+)= Σ weight · x[offset + t], t = 0 … T - 1, all in vectors.
template <int T, bool kFirst>
void accumulate(const float* x, const TapEntry* entry, const TapEntry* end, float* out, float start) {
  Vec sum[T];
  // Unrolled before anything else, else the sums pass through the stack.
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t) sum[t] = kFirst ? broadcast(start) : load(out + t * kLanes);
  for (; entry != end; ++entry) {
    const float* tap = x + entry->offset;
    const Vec weight = broadcast(entry->weight);
#pragma GCC unroll 32
    for (int t = 0; t < T; ++t) sum[t] += weight * load(tap + t * kLanes);
  }
#pragma GCC unroll 32
  for (int t = 0; t < T; ++t) store(out + t * kLanes, sum[t]);
}

using Accumulate = void (*)(const float*, const TapEntry*, const TapEntry*, float*, float);

template <bool kFirst, int... T>
constexpr std::array<Accumulate, sizeof...(T)> accumulate_table(std::integer_sequence<int, T...>) {
  return {accumulate<T + 1, kFirst>...};
}
constexpr auto kAccumulateFirst = accumulate_table<true>(std::make_integer_sequence<int, kMaxSegment>{});
constexpr auto kAccumulateMore = accumulate_table<false>(std::make_integer_sequence<int, kMaxSegment>{});

// Channels [0, count) of kLanes pixels (null: padding) become vectors: to[c * channel_stride + lane].
template <typename X>
void gather_lanes(const X* const* pixel, int64_t count, float* to, int64_t channel_stride) {
  for (int half = 0; half < kLanes; half += 8) {
    int64_t c = 0;
    for (; c + 8 <= count; c += 8) {
      Vec8 rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = pixel[half + i] ? load8(pixel[half + i] + c) : Vec8{};
      transpose8(rows);
      for (int i = 0; i < 8; ++i) store8(to + (c + i) * channel_stride + half, rows[i]);
    }
    for (; c < count; ++c)
      for (int i = 0; i < 8; ++i)
        to[c * channel_stride + half + i] = pixel[half + i] ? widen(pixel[half + i][c]) : 0.0f;
  }
}

// Vectors back to pixels: from[k * stride + lane] goes to the outputs from target[lane] on (-1: not wanted).
template <typename Y>
void scatter_lanes(const float* from, int64_t stride, int64_t count, const Output<Y>& out, const int64_t* target) {
  for (int half = 0; half < kLanes; half += 8) {
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) {
      Vec8 rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = load8(from + (k + i) * stride + half);
      transpose8(rows);
      for (int i = 0; i < 8; ++i)
        if (target[half + i] >= 0) finish8(out, target[half + i] + k, rows[i]);
    }
    for (; k < count; ++k)
      for (int i = 0; i < 8; ++i)
        if (target[half + i] >= 0) finish1(out, target[half + i] + k, from[k * stride + half + i]);
  }
}

// The input planes of one tile: image (or first of kLanes images) n, output rows from p0, columns from q0, group g.
template <typename X>
void load_planes(const UnstructuredPlan& plan, const ConvCall& call, int64_t n, int64_t p0, int64_t q0, int64_t g,
                 float* to) {
  const ConvShape& s = plan.shape;
  const Planes& planes = plan.planes;
  const int64_t channels = s.C / s.groups;
  const X* x = static_cast<const X*>(call.x) + n * call.x_stride_n + g * channels;
  const int64_t lane_step = plan.images_in_lanes ? 1 : kLanes;
  const int64_t width = plan.images_in_lanes ? kLanes : 1;
  int64_t at = 0;
  for (const int phase_h : planes.h.phases)
    for (const int phase_w : planes.w.phases)
      for (int64_t row = 0; row < planes.rows; ++row) {
        const int64_t h = (p0 + row) * s.stride_h + phase_h - s.pad_h;
        const bool row_inside = h >= 0 && h < s.H;
        for (int64_t col = 0; col < planes.cols; col += lane_step) {
          const X* pixel[kLanes];
          for (int lane = 0; lane < kLanes; ++lane) {
            const int64_t column = plan.images_in_lanes ? col : col + lane;
            const int64_t w = (q0 + column) * s.stride_w + phase_w - s.pad_w;
            const bool inside = row_inside && w >= 0 && w < s.W && column < planes.cols;
            const int64_t image = plan.images_in_lanes ? lane * call.x_stride_n : 0;
            pixel[lane] = inside ? x + image + h * call.x_stride_h + w * call.x_stride_w : nullptr;
          }
          gather_lanes(pixel, channels, to + (at + col) * width, plan.channel_stride);
        }
        at += planes.cols;
      }
}

template <typename Y>
void store_segment(const UnstructuredPlan& plan, const ConvCall& call, const Segment& segment, int64_t n, int64_t p0,
                   int64_t q0, int64_t k0, int64_t count, const float* sums) {
  const ConvShape& s = plan.shape;
  const Output<Y> out(call);
  for (int t = 0; t < segment.vectors; ++t) {
    int64_t target[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t flat = plan.images_in_lanes ? segment.first + t : segment.first + t * kLanes + lane;
      const int64_t row = flat / plan.planes.cols, col = flat % plan.planes.cols;
      const int64_t p = p0 + row, q = q0 + col, image = plan.images_in_lanes ? n + lane : n;
      const bool wanted = row < plan.planes.tile_p && col < plan.planes.tile_q && p < s.P && q < s.Q;
      target[lane] = wanted ? ((image * s.P + p) * s.Q + q) * s.K + k0 : -1;
    }
    scatter_lanes(sums + t * kLanes, segment.vectors * kLanes, count, out, target);
  }
}

template <typename X, typename Y>
void run_typed(const UnstructuredPlan& plan, const ConvCall& call, int64_t first_image, int64_t images) {
  const ConvShape& s = plan.shape;
  const int64_t channels = s.C / s.groups, filters = s.K / s.groups;
  const int64_t image_step = plan.images_in_lanes ? kLanes : 1;
  const int64_t tiles_p = ceil_div(s.P, plan.planes.tile_p), tiles_q = ceil_div(s.Q, plan.planes.tile_q);
  const int64_t tiles = images / image_step * tiles_p * tiles_q * s.groups;
  // Too few tiles for the threads: share out the output channels too (each part lays out the input again).
  const int64_t parts = std::clamp<int64_t>(ceil_div(2 * call.threads, std::max<int64_t>(tiles, 1)), 1,
                                            call.threads == 1 ? 1 : ceil_div(filters, 16));
  const float* bias = static_cast<const float*>(call.bias);
#pragma omp parallel num_threads(call.threads)
  {
    float* planes = thread_scratch(channels * plan.channel_stride + filters * kMaxSegment * kLanes);
    float* sums = planes + channels * plan.channel_stride;
    PhaseClock clock(call);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < tiles * parts; ++task) {
      int64_t rest = task;
      const int64_t part = rest % parts;
      rest /= parts;
      const int64_t q0 = rest % tiles_q * plan.planes.tile_q;
      rest /= tiles_q;
      const int64_t p0 = rest % tiles_p * plan.planes.tile_p;
      rest /= tiles_p;
      const int64_t g = rest % s.groups;
      const int64_t n = first_image + rest / s.groups * image_step;
      const int64_t k_begin = filters * part / parts, k_end = filters * (part + 1) / parts;
      load_planes<X>(plan, call, n, p0, q0, g, planes);
      clock.ends(kLayout);
      for (const Segment& segment : plan.segments) {
        if (plan.images_in_lanes && p0 + segment.first / plan.planes.cols >= s.P) continue;
        const int64_t row = segment.vectors * kLanes;
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
          const Accumulate run = (chunk == 0 ? kAccumulateFirst : kAccumulateMore)[segment.vectors - 1];
          const int64_t* starts = &plan.starts[(g * plan.chunks + chunk) * (filters + 1)];
          const TapEntry* entries = plan.entries.data();
          const float* x = planes + segment.offset;
          for (int64_t k = k_begin; k < k_end; ++k) {
            if (chunk > 0 && starts[k] == starts[k + 1]) continue;
            run(x, entries + starts[k], entries + starts[k + 1], sums + (k - k_begin) * row,
                bias ? bias[g * filters + k] : 0.0f);
          }
        }
        clock.ends(kProducts);
        store_segment<Y>(plan, call, segment, n, p0, q0, g * filters + k_begin, k_end - k_begin, sums);
        clock.ends(kStores);
      }
    }
  }
}

}  // namespace

void VPNS_RUN_UNSTRUCTURED(const UnstructuredPlan& plan, const ConvCall& call, int64_t first_image, int64_t images) {
  with_types(call, [&](auto x, auto y) { run_typed<decltype(x), decltype(y)>(plan, call, first_image, images); });
}

namespace {
