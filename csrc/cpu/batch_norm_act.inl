// The loops of batch_norm_act.h over vectors of 8 channels; included by an instruction set's own file.

// A chunk's two sums per channel are taken while it lies in the first-level cache, where its rows are wide in the second.
constexpr int64_t kChunkBytes = 16 * 1024;
// Of narrow rows fewer: a running float sum over more pixels would be far less exact than torch's.
constexpr int64_t kLeastChunkPixels = 32, kMostChunkPixels = 64;

struct Chunks {
  int64_t pixels, size;

  Chunks(int64_t pixels_, int64_t channels, int64_t element_bytes)
      : pixels(pixels_), size(std::clamp(kChunkBytes / (channels * element_bytes), kLeastChunkPixels, kMostChunkPixels)) {}

  int64_t count() const { return (pixels + size - 1) / size; }
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

// Four vectors that go together through the same arithmetic.
struct Vec32 {
  Vec8 v[4];
};
#define VPNS_EACH(expression)       \
  Vec32 r;                          \
  _Pragma("GCC unroll 4")           \
  for (int i = 0; i < 4; ++i) r.v[i] = expression; \
  return r
inline Vec32 operator+(Vec32 a, Vec32 b) { VPNS_EACH(a.v[i] + b.v[i]); }
inline Vec32 operator-(Vec32 a, Vec32 b) { VPNS_EACH(a.v[i] - b.v[i]); }
inline Vec32 operator*(Vec32 a, Vec32 b) { VPNS_EACH(a.v[i] * b.v[i]); }
inline Vec32 operator/(Vec32 a, float b) { VPNS_EACH(a.v[i] / b); }
inline Vec32& operator+=(Vec32& a, Vec32 b) { return a = a + b; }
inline Vec32 activate(Vec32 a, Act act) { VPNS_EACH(activate(a.v[i], act)); }

// One channel or eight: the same arithmetic in both.
template <int kWidth, typename T>
inline auto read_channels(const T* from) {
  if constexpr (kWidth == 32) {
    VPNS_EACH(load8(from + 8 * i));
  } else if constexpr (kWidth == 8) {
    return load8(from);
  } else {
    return widen(*from);
  }
}
template <typename T>
inline void write_channels(T* to, Vec32 a) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) store8(to + 8 * i, a.v[i]);
}
template <typename T>
inline void write_channels(T* to, Vec8 v) { store8(to, v); }
template <typename T>
inline void write_channels(T* to, float v) { narrow(to, v); }

inline Vec8 pass_where_active(Vec8 grad, Vec8 y, Act act) {
  if (act == Act::kNone) return grad;
  grad = y > 0.0f ? grad : Vec8{};
  return act == Act::kRelu6 ? (y < 6.0f ? grad : Vec8{}) : grad;
}
inline float pass_where_active(float grad, float y, Act act) {
  if (act == Act::kNone) return grad;
  return y > 0.0f && (act != Act::kRelu6 || y < 6.0f) ? grad : 0.0f;
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

// The moments of all pixels from those of the chunks, in double precision and in the order of the chunks.
inline void join_moments(const BatchNormForward& call, const Chunks& chunks, const float* stats) {
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t c = 0; c < call.channels; ++c) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < chunks.count(); ++i)
      sum += static_cast<double>(stats[2 * i * call.channels + c]) * static_cast<double>(chunks.end(i) - chunks.begin(i));
    const double mean = sum / static_cast<double>(call.pixels);
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const double away = stats[2 * i * call.channels + c] - mean;
      squares += stats[(2 * i + 1) * call.channels + c] + away * away * static_cast<double>(chunks.end(i) - chunks.begin(i));
    }
    call.mean[c] = static_cast<float>(mean);
    call.variance[c] = static_cast<float>(squares / static_cast<double>(call.pixels));
  }
}

template <typename T>
void normalise(const BatchNormForward& call, const Chunks& chunks, const float* scale) {
  const T* x = static_cast<const T*>(call.x);
  const T* residual = static_cast<const T*>(call.residual);
  T* y = static_cast<T*>(call.y);
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks.count(); ++chunk)
    for (int64_t p = chunks.begin(chunk); p < chunks.end(chunk); ++p)
      over_channels(call.channels, [&](int64_t c, auto width) {
        const int64_t at = p * call.channels + c;
        auto value = (read_channels<width()>(x + at) - read_channels<width()>(call.mean + c)) *
                         read_channels<width()>(scale + c) + read_channels<width()>(call.bias + c);
        if (residual != nullptr) value += read_channels<width()>(residual + at);
        write_channels(y + at, activate(value, call.act));
      });
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
  normalise<T>(call, chunks, scale.data());
}

// Where a ReLU passed is seen from x as well as from y, which then need not be read: all passes are bound by memory.
inline bool sees_from_x(const BatchNormBackward& call) {
  return call.act == Act::kRelu && call.grad_residual == nullptr;
}

// Σ g and Σ g · (x - mean) of a chunk, g being the gradient where the activation passed; g is kept where it is wanted.
template <typename T, bool kFromX>
void chunk_gradients(const BatchNormBackward& call, const float* scale, int64_t begin, int64_t end, float* sums) {
  const int64_t channels = call.channels;
  const T *grad = static_cast<const T*>(call.grad), *x = static_cast<const T*>(call.x), *y = static_cast<const T*>(call.y);
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
template <typename T, bool kFromX>
void input_gradient(const BatchNormBackward& call, const Chunks& chunks, const float* scale, const float* level,
                    const float* slope) {
  const T *grad = static_cast<const T*>(call.grad), *x = static_cast<const T*>(call.x), *y = static_cast<const T*>(call.y);
  const T* passed = static_cast<const T*>(call.grad_residual);
  T* grad_x = static_cast<T*>(call.grad_x);
#pragma omp parallel for num_threads(call.threads) schedule(static)
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
        write_channels(grad_x + at,
                       (g - read_channels<width()>(level + c) - away * read_channels<width()>(slope + c)) * by);
      });
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
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, product = 0;
    for (int64_t chunk = 0; chunk < chunks.count(); ++chunk) {
      sum += sums[2 * chunk * channels + c];
      product += sums[(2 * chunk + 1) * channels + c];
    }
    const double pixels = static_cast<double>(call.pixels), precision = 1.0 / (static_cast<double>(call.variance[c]) + call.eps);
    call.grad_bias[c] = static_cast<float>(sum);
    call.grad_weight[c] = static_cast<float>(product * std::sqrt(precision));
    level[c] = static_cast<float>(sum / pixels);
    slope[c] = static_cast<float>(product * precision / pixels);
  }
  input_gradient<T, kFromX>(call, chunks, scale.data(), level.data(), slope.data());
}

template <typename T>
void run_backward(const BatchNormBackward& call) {
  if (sees_from_x(call)) run_backward<T, true>(call);
  else run_backward<T, false>(call);
}

}  // namespace

void run_batch_norm_act_avx2(const BatchNormForward& call) {
  if (call.dtype == DType::kBF16) run_forward<Bf16>(call);
  else if (call.dtype == DType::kF16) run_forward<Fp16>(call);
  else run_forward<float>(call);
}

void run_batch_norm_act_backward_avx2(const BatchNormBackward& call) {
  if (call.dtype == DType::kBF16) run_backward<Bf16>(call);
  else if (call.dtype == DType::kF16) run_backward<Fp16>(call);
  else run_backward<float>(call);
}

namespace {
