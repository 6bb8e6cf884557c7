// Between pixels (channels side by side) and vectors (one channel of kLanes pixels): transposed square by square.
// Included after simd.inl.

// Joins of pairs at distance `kStep`: the butterfly that transposes a square of vectors.
template <int kStep, bool kHigh, int... I>
inline Vec interleave(Vec a, Vec b, std::integer_sequence<int, I...>) {
  // Lane i keeps its place where i & kStep says so; else it comes from the partner.
  return __builtin_shufflevector(
      a, b, (kHigh ? ((I & kStep) ? kLanes + I : I + kStep) : ((I & kStep) ? kLanes + I - kStep : I))...);
}
template <int kStep>
inline void transpose_step(Vec r[kLanes]) {
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStep) continue;
    const Vec a = r[i], b = r[i + kStep];
    r[i] = interleave<kStep, false>(a, b, kAll);
    r[i + kStep] = interleave<kStep, true>(a, b, kAll);
  }
}
inline void transpose(Vec r[kLanes]) {
  transpose_step<1>(r);
  transpose_step<2>(r);
  transpose_step<4>(r);
  if constexpr (kLanes > 8) transpose_step<8>(r);
}

inline void store(_Float16* to, Vec v) { store(reinterpret_cast<Fp16*>(to), v); }

// Channels [0, count) of kLanes pixels (null: padding) become vectors: to[c * channel_stride + lane].
template <typename X, typename Plane>
void gather_lanes(const X* const* pixel, int64_t count, Plane* to, int64_t channel_stride) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    Vec rows[kLanes];
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) rows[lane] = pixel[lane] ? load(pixel[lane] + c) : Vec{};
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(to + (c + i) * channel_stride, rows[i]);
  }
  for (; c < count; ++c)
    for (int lane = 0; lane < kLanes; ++lane)
      to[c * channel_stride + lane] = static_cast<Plane>(pixel[lane] ? widen(pixel[lane][c]) : 0.0f);
}

template <typename Y>
inline void finish(const Output<Y>& out, int64_t at, Vec sums) {
  if (out.residual != nullptr) sums += load(out.residual + at);
  store(out.y + at, activate(sums, out.act));
}

// Vectors back to pixels: from[k * stride + lane] goes to the outputs from target[lane] on (-1: not wanted).
template <typename Y>
void scatter_lanes(const float* from, int64_t stride, int64_t count, const Output<Y>& out, const int64_t* target) {
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes) {
    Vec rows[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = load(from + (k + i) * stride);
    transpose(rows);
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane)
      if (target[lane] >= 0) finish(out, target[lane] + k, rows[lane]);
  }
  for (; k < count; ++k)
    for (int lane = 0; lane < kLanes; ++lane)
      if (target[lane] >= 0) finish1(out, target[lane] + k, from[k * stride + lane]);
}
