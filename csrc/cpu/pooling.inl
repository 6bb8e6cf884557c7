// The loops of pooling.h; included after batch_norm_act.inl, whose channels they share.

inline Vec8 larger(Vec8 a, Vec8 b) { return (b > a) | (b != b) ? b : a; }  // a NaN wins, as in torch
inline float larger(float a, float b) { return b > a || b != b ? b : a; }
inline Vec32 larger(Vec32 a, Vec32 b) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) a.v[i] = larger(a.v[i], b.v[i]);
  return a;
}

template <int kWidth>
inline auto filled(float value) {
  if constexpr (kWidth == 32) {
    const Vec8 v = Vec8{} + value;
    return Vec32{{v, v, v, v}};
  } else if constexpr (kWidth == 8) {
    return Vec8{} + value;
  } else {
    return value;
  }
}

// Inputs [begin, end) of one axis that an output reads, and what the mean divides by.
struct PoolSpan {
  int64_t begin, end, divisor;
};

inline PoolSpan pool_span(const PoolCall& call, int64_t out, int64_t in, int64_t outs, int64_t window, int64_t stride,
                          int64_t pad) {
  if (call.pool == Pool::kAdaptiveMean) {
    const int64_t begin = out * in / outs, end = ((out + 1) * in + outs - 1) / outs;
    return {begin, end, end - begin};
  }
  const int64_t first = out * stride - pad, last = std::min(first + window, in + pad);
  const int64_t begin = std::max<int64_t>(first, 0), end = std::min(last, in);
  return {begin, end, call.counts_padding ? last - first : end - begin};
}

template <typename T>
void pool_pixels(const PoolCall& call) {
  const ConvShape& s = call.shape;
  const T* const x = static_cast<const T*>(call.x);
  T* const y = static_cast<T*>(call.y);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t row = 0; row < s.N * s.P; ++row) {
    const PoolSpan h = pool_span(call, row % s.P, s.H, s.P, s.R, s.stride_h, s.pad_h);
    const T* const image = x + row / s.P * s.H * s.W * s.C;
    for (int64_t q = 0; q < s.Q; ++q) {
      const PoolSpan w = pool_span(call, q, s.W, s.Q, s.S, s.stride_w, s.pad_w);
      T* const to = y + (row * s.Q + q) * s.C;
      over_channels(s.C, [&](int64_t c, auto width) {
        constexpr int kWidth = width();
        const bool is_max = call.pool == Pool::kMax;
        auto sum = filled<kWidth>(is_max ? -std::numeric_limits<float>::infinity() : 0.0f);
        for (int64_t r = h.begin; r < h.end; ++r)
          for (int64_t col = w.begin; col < w.end; ++col) {
            const auto in = read_channels<kWidth>(image + (r * s.W + col) * s.C + c);
            sum = is_max ? larger(sum, in) : sum + in;
          }
        write_channels(to + c, is_max ? sum : sum / static_cast<float>(h.divisor * w.divisor));
      });
    }
  }
}

}  // namespace

void run_pool_avx2(const PoolCall& call) {
  if (call.dtype == DType::kBF16) pool_pixels<Bf16>(call);
  else if (call.dtype == DType::kF16) pool_pixels<Fp16>(call);
  else pool_pixels<float>(call);
}

namespace {
