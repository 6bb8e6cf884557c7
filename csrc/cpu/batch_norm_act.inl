// The loops of batch_norm_act.h for one vector length; included by each instruction set's own file. Needs
// VPNS_RUN_BATCH_NORM_ACT and VPNS_RUN_BATCH_NORM_ACT_BACKWARD (the functions' names).

// A chunk's two sums per channel are taken while it lies in the first-level cache, or in the second where its rows are
// wide.
constexpr int64_t kChunkBytes = 16 * 1024;
// Of narrow rows fewer: a running float sum over more pixels would be far less exact than torch's.
constexpr int64_t kLeastChunkPixels = 32, kMostChunkPixels = 64;

struct Chunks {
  int64_t pixels, size;

  Chunks(int64_t pixels_, int64_t channels, int64_t element_bytes)
      : pixels(pixels_),
        size(std::clamp(kChunkBytes / (channels * element_bytes), kLeastChunkPixels, kMostChunkPixels)) {}

  int64_t count() const { return ceil_div(pixels, size); }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(pixels, (chunk + 1) * size); }
};

// Calls body(c, width) for 32 channels at a time (a cache line of halves, two of floats), then 8, then one.
template <typename Body>
void over_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + 32 <= channels; c += 32) body(c, std::integral_constant<int, 32>{});
  for (; c + 8 <= channels; c += 8) body(c, std::integral_constant<int, 8>{});
  for (; c < channels; ++c) body(c, std::integral_constant<int, 1>{});
}

// The vectors of 32 channels, which go together through the same arithmetic.
constexpr int kVectors = 32 / kLanes;
struct Vec32 {
  Vec v[kVectors];
};
#define VPNS_EACH(expression)       \
  Vec32 r;                          \
  _Pragma("GCC unroll 4")           \
  for (int i = 0; i < kVectors; ++i) r.v[i] = expression; \
  return r
inline Vec32 operator+(Vec32 a, Vec32 b) { VPNS_EACH(a.v[i] + b.v[i]); }
inline Vec32 operator-(Vec32 a, Vec32 b) { VPNS_EACH(a.v[i] - b.v[i]); }
inline Vec32 operator*(Vec32 a, Vec32 b) { VPNS_EACH(a.v[i] * b.v[i]); }
inline Vec32 operator/(Vec32 a, float b) { VPNS_EACH(a.v[i] / b); }
inline Vec32& operator+=(Vec32& a, Vec32 b) { return a = a + b; }

inline Vec32 activate(Vec32 a, Act act) { VPNS_EACH(activate(a.v[i], act)); }

// One channel, eight or 32: the same arithmetic in all.
template <int kWidth, typename T>
inline auto read_channels(const T* from) {
  if constexpr (kWidth == 32) {
    VPNS_EACH(load(from + kLanes * i));
  } else if constexpr (kWidth == 8) {
    return load8(from);
  } else {
    return widen(*from);
  }
}
template <typename T>
inline void write_channels(T* to, Vec32 a) {
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; ++i) store(to + kLanes * i, a.v[i]);
}
template <typename T>
inline void write_channels(T* to, Vec8 v) { store8(to, v); }
template <typename T>
inline void write_channels(T* to, float v) { narrow(to, v); }

// Outputs too large to stay in the caches go past them in whole lines: to write a line the usual way reads it first.
#if defined(__AVX512BW__)
template <bool kStreams, typename T>
inline void put_channels(T* to, Vec32 a) {
  if constexpr (!kStreams) write_channels(to, a);
  else if constexpr (std::is_same_v<T, float>)
    for (int i = 0; i < kVectors; ++i) _mm512_stream_ps(to + kLanes * i, (__m512)a.v[i]);
  else {
    const __m512i low = _mm512_castsi256_si512(round_to_16(T{}, (__m512)a.v[0]));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to),
                        _mm512_inserti64x4(low, round_to_16(T{}, (__m512)a.v[1]), 1));
  }
}
inline bool is_streamed(const void* to, int64_t channels, int64_t bytes) {
  return bytes >= kStreamedBytes && channels % 32 == 0 && is_line(to);
}
#else
inline bool is_streamed(const void*, int64_t, int64_t) { return false; }
#endif
template <bool kStreams, typename T, typename V>
inline void put_channels(T* to, V v) {
  write_channels(to, v);
}

template <typename V>
inline V pass_where_active(V grad, V y, Act act) {
  if (act == Act::kNone) return grad;
  grad = y > 0.0f ? grad : V{};
  return act == Act::kRelu6 ? (y < 6.0f ? grad : V{}) : grad;
}
inline Vec32 pass_where_active(Vec32 grad, Vec32 y, Act act) { VPNS_EACH(pass_where_active(grad.v[i], y.v[i], act)); }
#undef VPNS_EACH

// Mean and sum of squared deviations of a chunk, by channel: to stats[0 … C) and stats[C … 2C).
template <typename T>
void chunk_moments(const T* x, int64_t pixels, int64_t channels, float* stats) {
  over_channels(channels, [&](int64_t c, auto width) {
    using V = decltype(read_channels<width()>(stats));
    V sum{}, squares{};
    for (int64_t p = 0; p < pixels; ++p) sum += read_channels<width()>(x + p * channels + c);
    const V mean = sum / static_cast<float>(pixels);
    for (int64_t p = 0; p < pixels; ++p) {
      const V deviation = read_channels<width()>(x + p * channels + c) - mean;
      squares += deviation * deviation;
    }
    write_channels(stats + c, mean);
    write_channels(stats + channels + c, squares);
  });
}

// Calls body(first, count) for the channels in tens or so, side by side, so that what runs over all chunks reads whole
// cache lines and waits for no sum.
constexpr int64_t kSideBySide = 16;
template <typename Body>
void over_sums(int64_t channels, int threads, const Body& body) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < channels; c += kSideBySide) body(c, std::min(kSideBySide, channels - c));
}

// The moments of all pixels from those of the chunks, in double precision and in the order of the chunks.
inline void join_moments(const BatchNormForward& call, const Chunks& chunks, const float* stats) {
  over_sums(call.channels, call.threads, [&](int64_t first, int64_t count) {
    double mean[kSideBySide] = {}, squares[kSideBySide] = {};
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const float* const means = stats + 2 * i * call.channels + first;
      const double pixels = static_cast<double>(chunks.end(i) - chunks.begin(i));
      for (int64_t c = 0; c < count; ++c) mean[c] += static_cast<double>(means[c]) * pixels;
    }
    for (int64_t c = 0; c < count; ++c) mean[c] /= static_cast<double>(call.pixels);
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const float* const means = stats + 2 * i * call.channels + first;
      const double pixels = static_cast<double>(chunks.end(i) - chunks.begin(i));
      for (int64_t c = 0; c < count; ++c) {
        const double away = means[c] - mean[c];
        squares[c] += means[call.channels + c] + away * away * pixels;
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      call.mean[first + c] = static_cast<float>(mean[c]);
      call.variance[first + c] = static_cast<float>(squares[c] / static_cast<double>(call.pixels));
    }
  });
}

template <typename T, bool kStreams>
void normalise(const BatchNormForward& call, const Chunks& chunks, const float* scale) {
  const T* x = static_cast<const T*>(call.x);
  const T* residual = static_cast<const T*>(call.residual);
  T* y = static_cast<T*>(call.y);
#pragma omp parallel num_threads(call.threads)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
      for (int64_t p = chunks.begin(chunk); p < chunks.end(chunk); ++p)
        over_channels(call.channels, [&](int64_t c, auto width) {
          const int64_t at = p * call.channels + c;
          auto value = (read_channels<width()>(x + at) - read_channels<width()>(call.mean + c)) *
                           read_channels<width()>(scale + c) + read_channels<width()>(call.bias + c);
          if (residual != nullptr) value += read_channels<width()>(residual + at);
          put_channels<kStreams>(y + at, activate(value, call.act));
        });
    end_streams();
  }
}

inline void scales(const float* weight, const float* variance, float eps, int64_t channels, float* scale) {
  for (int64_t c = 0; c < channels; ++c) scale[c] = weight[c] / std::sqrt(variance[c] + eps);
}

template <typename T>
void run_forward(const BatchNormForward& call) {
  const Chunks chunks(call.pixels, call.channels, sizeof(T));
  std::vector<float> stats(2 * chunks.count() * call.channels), scale(call.channels);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
    chunk_moments(static_cast<const T*>(call.x) + chunks.begin(chunk) * call.channels,
                  chunks.end(chunk) - chunks.begin(chunk), call.channels, &stats[2 * chunk * call.channels]);
  join_moments(call, chunks, stats.data());
  scales(call.weight, call.variance, call.eps, call.channels, scale.data());
  if (is_streamed(call.y, call.channels, call.pixels * call.channels * static_cast<int64_t>(sizeof(T))))
    normalise<T, true>(call, chunks, scale.data());
  else
    normalise<T, false>(call, chunks, scale.data());
}

// Where a ReLU passed is seen from x as well as from y, which then need not be read: all passes are bound by memory.
inline bool sees_from_x(const BatchNormBackward& call) {
  return call.act == Act::kRelu && call.grad_residual == nullptr;
}

// Σ g and Σ g · (x - mean) of a chunk, g being the gradient where the activation passed; g is kept where it is wanted.
template <typename T, bool kFromX>
void chunk_gradients(const BatchNormBackward& call, const float* scale, int64_t begin, int64_t end, float* sums) {
  const int64_t channels = call.channels;
  const T* grad = static_cast<const T*>(call.grad);
  const T *x = static_cast<const T*>(call.x), *y = static_cast<const T*>(call.y);
  T* passed = static_cast<T*>(call.grad_residual);
  over_channels(channels, [&](int64_t c, auto width) {
    using V = decltype(read_channels<width()>(sums));
    V sum{}, product{};
    const V mean = read_channels<width()>(call.mean + c);
    for (int64_t at = begin * channels + c; at < end * channels; at += channels) {
      const V away = read_channels<width()>(x + at) - mean;
      V g = read_channels<width()>(grad + at);
      if constexpr (kFromX)
        g = pass_where_active(g, away * read_channels<width()>(scale + c) + read_channels<width()>(call.bias + c),
                              Act::kRelu);
      else if (call.act != Act::kNone)
        g = pass_where_active(g, read_channels<width()>(y + at), call.act);
      if (passed != nullptr) write_channels(passed + at, g);
      sum += g;
      product += g * away;
    }
    write_channels(sums + c, sum);
    write_channels(sums + channels + c, product);
  });
}

// dx = weight / std · (g - Σg / M - (x - mean) / var · Σg(x - mean) / M).
template <typename T, bool kFromX, bool kStreams>
void input_gradient(const BatchNormBackward& call, const Chunks& chunks, const float* scale, const float* level,
                    const float* slope) {
  const T* grad = static_cast<const T*>(call.grad);
  const T *x = static_cast<const T*>(call.x), *y = static_cast<const T*>(call.y);
  const T* passed = static_cast<const T*>(call.grad_residual);
  T* grad_x = static_cast<T*>(call.grad_x);
#pragma omp parallel num_threads(call.threads)
  {
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
      for (int64_t p = chunks.begin(chunk); p < chunks.end(chunk); ++p)
        over_channels(call.channels, [&](int64_t c, auto width) {
          const int64_t at = p * call.channels + c;
          const auto away = read_channels<width()>(x + at) - read_channels<width()>(call.mean + c);
          const auto by = read_channels<width()>(scale + c);
          auto g = read_channels<width()>((passed != nullptr ? passed : grad) + at);
          if constexpr (kFromX)
            g = pass_where_active(g, away * by + read_channels<width()>(call.bias + c), Act::kRelu);
          else if (passed == nullptr && call.act != Act::kNone)
            g = pass_where_active(g, read_channels<width()>(y + at), call.act);
          put_channels<kStreams>(
              grad_x + at, (g - read_channels<width()>(level + c) - away * read_channels<width()>(slope + c)) * by);
        });
    end_streams();
  }
}

template <typename T, bool kFromX>
void run_backward(const BatchNormBackward& call) {
  const Chunks chunks(call.pixels, call.channels, sizeof(T));
  const int64_t channels = call.channels;
  std::vector<float> sums(2 * chunks.count() * channels), scale(channels), level(channels), slope(channels);
  scales(call.weight, call.variance, call.eps, channels, scale.data());
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
    chunk_gradients<T, kFromX>(call, scale.data(), chunks.begin(chunk), chunks.end(chunk), &sums[2 * chunk * channels]);
  over_sums(channels, call.threads, [&](int64_t first, int64_t count) {
    double sum[kSideBySide] = {}, product[kSideBySide] = {};
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const float* const own = &sums[2 * i * channels + first];
      for (int64_t c = 0; c < count; ++c) {
        sum[c] += own[c];
        product[c] += own[channels + c];
      }
    }
    const double pixels = static_cast<double>(call.pixels);
    for (int64_t c = 0; c < count; ++c) {
      const double precision = 1.0 / (static_cast<double>(call.variance[first + c]) + call.eps);
      call.grad_bias[first + c] = static_cast<float>(sum[c]);
      call.grad_weight[first + c] = static_cast<float>(product[c] * std::sqrt(precision));
      level[first + c] = static_cast<float>(sum[c] / pixels);
      slope[first + c] = static_cast<float>(product[c] * precision / pixels);
    }
  });
  if (is_streamed(call.grad_x, channels, call.pixels * channels * static_cast<int64_t>(sizeof(T))))
    input_gradient<T, kFromX, true>(call, chunks, scale.data(), level.data(), slope.data());
  else
    input_gradient<T, kFromX, false>(call, chunks, scale.data(), level.data(), slope.data());
}

template <typename T>
void run_backward(const BatchNormBackward& call) {
  if (sees_from_x(call)) run_backward<T, true>(call);
  else run_backward<T, false>(call);
}

}  // namespace

void VPNS_RUN_BATCH_NORM_ACT(const BatchNormForward& call) {
  if (call.dtype == DType::kBF16) run_forward<Bf16>(call);
  else if (call.dtype == DType::kF16) run_forward<Fp16>(call);
  else run_forward<float>(call);
}

void VPNS_RUN_BATCH_NORM_ACT_BACKWARD(const BatchNormBackward& call) {
  if (call.dtype == DType::kBF16) run_backward<Bf16>(call);
  else if (call.dtype == DType::kF16) run_backward<Fp16>(call);
  else run_backward<float>(call);
}

namespace {
