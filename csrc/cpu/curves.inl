// The loops of curves.h; included after batch_norm_act.inl, whose channels they share.

inline Vec8 at_most(Vec8 v, float limit) { return v > limit ? Vec8{} + limit : v; }  // a NaN stays
inline Vec8 at_least(Vec8 v, float limit) { return v < limit ? Vec8{} + limit : v; }

// e^v within two roundings: 2^n by its exponent bits, the rest by a polynomial (Cephes' expf).
inline Vec8 exponential(Vec8 v) {
  v = at_least(at_most(v, 88.0f), -87.0f);
  const __m256 rounded = _mm256_round_ps(reinterpret_cast<__m256>(v * 1.44269504088896341f),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec8 n = reinterpret_cast<Vec8>(rounded);
  const Vec8 r = v - n * 0.693359375f + n * 2.12194440e-4f;
  Vec8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Int8 power = (reinterpret_cast<Int8>(_mm256_cvtps_epi32(rounded)) + 127) << 23;
  return p * reinterpret_cast<Vec8>(power);
}
inline Vec8 logistic(Vec8 v) { return 1.0f / (1.0f + exponential(-v)); }
inline Vec8 ramp(Vec8 v) { return at_most(at_least(v + 3.0f, 0.0f), 6.0f) / 6.0f; }

// The error function within 2e-7 (Abramowitz and Stegun, 7.1.26).
inline Vec8 error_function(Vec8 v) {
  const Vec8 size = v < 0.0f ? -v : v;
  const Vec8 t = 1.0f / (1.0f + 0.3275911f * size);
  Vec8 p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec8 found = 1.0f - p * t * exponential(-size * size);
  return v < 0.0f ? -found : found;
}

template <Curve kCurve>
inline Vec8 bend(Vec8 v) {
  if constexpr (kCurve == Curve::kSilu) return v * logistic(v);
  else if constexpr (kCurve == Curve::kHardswish) return v * ramp(v);
  else if constexpr (kCurve == Curve::kHardsigmoid) return ramp(v);
  else if constexpr (kCurve == Curve::kSigmoid) return logistic(v);
  else return 0.5f * v * (1.0f + error_function(v * 0.70710678118654752f));
}
template <Curve kCurve>
inline float bend(float v) { return bend<kCurve>(Vec8{} + v)[0]; }
template <Curve kCurve>
inline Vec32 bend(Vec32 v) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v.v[i] = bend<kCurve>(v.v[i]);
  return v;
}

template <Curve kCurve, typename T>
void bend_pixels(const CurveCall& call) {
  T* const y = static_cast<T*>(call.y);
  // Pixels that lie side by side are one long one, so that few channels are left over.
  const bool is_dense = call.stride == call.channels;
  constexpr int64_t kRun = 4096;
  const int64_t all = call.pixels * call.channels;
  const int64_t runs = is_dense ? ceil_div(all, kRun) : call.pixels;
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t run = 0; run < runs; ++run) {
    T* const from = y + run * (is_dense ? kRun : call.stride);
    const int64_t count = is_dense ? std::min(kRun, all - run * kRun) : call.channels;
    over_channels(count, [&](int64_t c, auto width) {
      write_channels(from + c, bend<kCurve>(read_channels<width()>(from + c)));
    });
  }
}

template <typename T>
void bend_by(const CurveCall& call) {
  switch (call.curve) {
    case Curve::kSilu: return bend_pixels<Curve::kSilu, T>(call);
    case Curve::kHardswish: return bend_pixels<Curve::kHardswish, T>(call);
    case Curve::kHardsigmoid: return bend_pixels<Curve::kHardsigmoid, T>(call);
    case Curve::kSigmoid: return bend_pixels<Curve::kSigmoid, T>(call);
    case Curve::kGelu: return bend_pixels<Curve::kGelu, T>(call);
    case Curve::kNone: case Curve::kCount: return;
  }
}

template <typename T>
void gate_pixels(const GateCall& call) {
  const T *const a = static_cast<const T*>(call.a), *const gate = static_cast<const T*>(call.gate);
  T* const y = static_cast<T*>(call.y);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t p = 0; p < call.images * call.pixels; ++p) {
    const int64_t at = p * call.channels, by = call.is_per_image ? p / call.pixels * call.channels : at;
    over_channels(call.channels, [&](int64_t c, auto width) {
      write_channels(y + at + c, read_channels<width()>(a + at + c) * read_channels<width()>(gate + by + c));
    });
  }
}

// Elements travel by their bits; two groups are most common, and GCC takes vectors where the number is known.
template <int kGroups, typename T>
void shuffle_pixels(const ShuffleCall& call) {
  const int64_t groups = kGroups > 0 ? kGroups : call.groups, members = call.channels / groups;
  const T* const x = static_cast<const T*>(call.x);
  T* const y = static_cast<T*>(call.y);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t p = 0; p < call.pixels; ++p) {
    const T* const from = x + p * call.channels;
    T* const to = y + p * call.channels;
    for (int64_t i = 0; i < members; ++i)
      for (int64_t g = 0; g < groups; ++g) to[i * groups + g] = from[g * members + i];
  }
}

template <typename T>
void shuffle(const ShuffleCall& call) {
  if (call.groups == 2) shuffle_pixels<2, T>(call);
  else shuffle_pixels<0, T>(call);
}

}  // namespace

void run_curve_avx2(const CurveCall& call) {
  if (call.dtype == DType::kBF16) bend_by<Bf16>(call);
  else if (call.dtype == DType::kF16) bend_by<Fp16>(call);
  else bend_by<float>(call);
}
void run_gate_avx2(const GateCall& call) {
  if (call.dtype == DType::kBF16) gate_pixels<Bf16>(call);
  else if (call.dtype == DType::kF16) gate_pixels<Fp16>(call);
  else gate_pixels<float>(call);
}
void run_shuffle_avx2(const ShuffleCall& call) {
  if (call.dtype == DType::kF32) shuffle<uint32_t>(call);
  else shuffle<uint16_t>(call);
}

namespace {
