// The loops of pooling.h; included after batch_norm_act.inl, whose channels they share.

using Shorts = int16_t __attribute__((vector_size(32)));
using ShortBits = uint16_t __attribute__((vector_size(32)));
using Words = int32_t __attribute__((vector_size(32)));
using WordBits = uint32_t __attribute__((vector_size(32)));
// A number's bits as an integer that compares as the number does, but that every NaN is above all numbers, as in torch:
// the bits of negative numbers run backwards, and what lies below -inf comes round to the top.
template <typename T>
struct Key {
  static constexpr bool kIsWide = sizeof(T) == 4;
  using Int = std::conditional_t<kIsWide, int32_t, int16_t>;
  using Vector = std::conditional_t<kIsWide, Words, Shorts>;
  using BitVector = std::conditional_t<kIsWide, WordBits, ShortBits>;
  static constexpr std::make_unsigned_t<Int> kMantissa = std::is_same_v<T, float>  ? 0x7fffff
                                                         : std::is_same_v<T, Bf16> ? 0x7f
                                                                                   : 0x3ff;
  static constexpr Int kLeast = std::numeric_limits<Int>::min();  // of -inf

  static Vector backwards(Vector v) { return v ^ ((v >> (8 * sizeof(Int) - 1)) & std::numeric_limits<Int>::max()); }
  static Vector of(Vector number) { return (Vector)((BitVector)backwards(number) - kMantissa); }
  static Vector number(Vector key) { return backwards((Vector)((BitVector)key + kMantissa)); }
};

// to[i...] = body(i, how many numbers from there), a vector at a time, for all i of `count`.
template <typename Vector, typename Int, typename Body>
inline void over_vectors(int64_t count, Int* to, const Body& body) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(Int);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vector v = body(i, std::integral_constant<int64_t, kLanes>{});
    std::memcpy(to + i, &v, sizeof v);
  }
  if (i == count) return;
  const Vector v = body(i, count - i);
  std::memcpy(to + i, &v, (count - i) * sizeof(Int));
}

template <typename Vector, typename Int>
inline Vector some_of(const Int* from, int64_t count) {
  Vector v{};
  if (count == static_cast<int64_t>(sizeof v / sizeof(Int))) std::memcpy(&v, from, sizeof v);
  else std::memcpy(&v, from, count * sizeof(Int));
  return v;
}

// Inputs [begin, end) of one axis that an output reads, and what the mean divides by.
struct PoolSpan {
  int64_t begin, end, divisor;
};

inline PoolSpan pool_span(const PoolCall& call, int64_t out, int64_t in, int64_t outs, int64_t window, int64_t stride,
                          int64_t pad) {
  if (call.pool == Pool::kAdaptiveMean) {
    const int64_t begin = out * in / outs, end = ceil_div((out + 1) * in, outs);
    return {begin, end, end - begin};
  }
  const int64_t first = out * stride - pad, last = std::min(first + window, in + pad);
  const int64_t begin = std::max<int64_t>(first, 0), end = std::min(last, in);
  return {begin, end, call.counts_padding ? last - first : end - begin};
}

// The largest of each column's rows first, then of the columns: neighbouring windows share them.
template <typename T>
void max_pool(const PoolCall& call) {
  using K = Key<T>;
  using V = typename K::Vector;
  using Int = typename K::Int;
  const ConvShape& s = call.shape;
  const Int* const x = static_cast<const Int*>(call.x);
  Int* const y = static_cast<Int*>(call.y);
  const int64_t row_size = s.W * s.C, rows = call.rows < 0 ? s.P : call.rows;
#pragma omp parallel num_threads(call.threads)
  {
    Int* const columns = reinterpret_cast<Int*>(thread_scratch(row_size));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < s.N * rows; ++i) {
      const int64_t row = i / rows * s.P + call.first_row + i % rows;
      const PoolSpan h = pool_span(call, row % s.P, s.H, s.P, s.R, s.stride_h, s.pad_h);
      const Int* const image = x + row / s.P * s.H * row_size;
      over_vectors<V>(row_size, columns, [&](int64_t i, auto count) {
        V most = V{} + K::kLeast;
        for (int64_t r = h.begin; r < h.end; ++r) {
          const V key = K::of(some_of<V>(image + r * row_size + i, count));
          most = most > key ? most : key;
        }
        return most;
      });
      for (int64_t q = 0; q < s.Q; ++q) {
        const PoolSpan w = pool_span(call, q, s.W, s.Q, s.S, s.stride_w, s.pad_w);
        over_vectors<V>(s.C, y + (row * s.Q + q) * s.C, [&](int64_t c, auto count) {
          V most = V{} + K::kLeast;
          for (int64_t col = w.begin; col < w.end; ++col) {
            const V key = some_of<V>(columns + col * s.C + c, count);
            most = most > key ? most : key;
          }
          return K::number(most);
        });
      }
    }
  }
}

template <typename T>
void mean_pool(const PoolCall& call) {
  const ConvShape& s = call.shape;
  const T* const x = static_cast<const T*>(call.x);
  T* const y = static_cast<T*>(call.y);
  const int64_t rows = call.rows < 0 ? s.P : call.rows;
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t i = 0; i < s.N * rows; ++i) {
    const int64_t row = i / rows * s.P + call.first_row + i % rows;
    const PoolSpan h = pool_span(call, row % s.P, s.H, s.P, s.R, s.stride_h, s.pad_h);
    const T* const image = x + row / s.P * s.H * s.W * s.C;
    for (int64_t q = 0; q < s.Q; ++q) {
      const PoolSpan w = pool_span(call, q, s.W, s.Q, s.S, s.stride_w, s.pad_w);
      T* const to = y + (row * s.Q + q) * s.C;
      over_channels(s.C, [&](int64_t c, auto width) {
        decltype(read_channels<width()>(image)) sum{};
        for (int64_t r = h.begin; r < h.end; ++r)
          for (int64_t col = w.begin; col < w.end; ++col)
            sum += read_channels<width()>(image + (r * s.W + col) * s.C + c);
        write_channels(to + c, sum / static_cast<float>(h.divisor * w.divisor));
      });
    }
  }
}

template <typename T>
void pool_of(const PoolCall& call) {
  if (call.pool == Pool::kMax) max_pool<T>(call);
  else mean_pool<T>(call);
}

}  // namespace

void run_pool_avx2(const PoolCall& call) {
  if (call.dtype == DType::kBF16) pool_of<Bf16>(call);
  else if (call.dtype == DType::kF16) pool_of<Fp16>(call);
  else pool_of<float>(call);
}

namespace {
