// Convolutions whose outputs read few channels each (depthwise.h, grouped.h), by tiles of two rows and four columns of
// outputs on vectors of channels: each input is loaded and widened once for a tile, whose sums stay in registers.
// Included after lanes.inl.

constexpr int kTileRows = 2, kTileColumns = 4;

// Where a tile of outputs is: `rows` rows from p on, `count` columns from q on; steps from one output to the next.
struct ChannelTile {
  int64_t n, p, q;
  int rows, count;
  int64_t y, step_p, step_q;
};

// How each output finds what it reads in a vector of inputs, in kSteps multiply-adds. First: depthwise.
struct ReadsOwnChannel {
  static constexpr int kSteps = 1;
  using Inputs = Vec;
  template <typename X>
  static Vec read(const X* from) { return load(from); }
  static Vec take(Vec x, int) { return x; }
  static Vec multiply_add(Vec x, Vec weight, Vec sum) { return sum + x * weight; }
};

// By step, where each lane finds what it reads: the step-th of the kSteps entries of its group of kWidth lanes.
template <int kWidth, int kSteps>
struct GroupIndices {
  alignas(64) int32_t of[kSteps][kLanes];
  constexpr GroupIndices() : of() {
    for (int step = 0; step < kSteps; ++step)
      for (int lane = 0; lane < kLanes; ++lane) of[step][lane] = lane / kWidth * kSteps + step;
  }
};
template <int kWidth, int kSteps>
constexpr GroupIndices<kWidth, kSteps> kGroupIndices;

// Groups of kWidth channels that make as many: lane k reads the step-th channel of its group.
template <int kWidth>
struct ReadsGroup {
  static constexpr int kSteps = kWidth;
  using Inputs = Vec;
  using Indices = int32_t __attribute__((vector_size(kLanes * 4)));
  template <typename X>
  static Vec read(const X* from) { return load(from); }
  static Vec take(Vec x, int step) {
    Indices indices;
    std::memcpy(&indices, kGroupIndices<kWidth, kSteps>.of[step], sizeof indices);
    return __builtin_shuffle(x, indices);
  }
  static Vec multiply_add(Vec x, Vec weight, Vec sum) { return sum + x * weight; }
};

#if defined(__AVX512BF16__)
// The same in bfloat16: pairs of channels are words, of which a vector of outputs reads the eight it shares.
template <int kWidth>
struct ReadsGroupOfPairs {
  static constexpr int kSteps = kWidth / 2;
  using Inputs = __m256i;
  static __m256i read(const Bf16* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static Vec take(__m256i words, int step) {
    const __m512i indices = _mm512_load_si512(kGroupIndices<kWidth, kSteps>.of[step]);
    return (Vec)_mm512_permutexvar_epi32(indices, _mm512_castsi256_si512(words));
  }
  static Vec multiply_add(Vec x, Vec weight, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)x);
  }
};
#endif

// kLanes channels, from c on, of a tile's outputs; of a whole one nothing lies outside.
// Weights [taps][steps][channels].
template <typename Reads, int kSize, int kStride, bool kWhole, typename X, typename Y>
void run_channel_tile(const ConvShape& s, const float* weights, int64_t channels, const ConvCall& call,
                      const Output<Y>& out, const ChannelTile& tile, int64_t c) {
  constexpr int kInputs = (kTileColumns - 1) * kStride + kSize;
  const int64_t h0 = tile.p * kStride - s.pad_h, w0 = tile.q * kStride - s.pad_w;
  const int64_t step_h = call.x_stride_h, step_w = call.x_stride_w;
  const X* from = static_cast<const X*>(call.x) + tile.n * call.x_stride_n + h0 * step_h + w0 * step_w + c;
  weights += c;
  Vec sum[kTileRows][kTileColumns] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kSize + (kTileRows - 1) * kStride; ++i, from += step_h) {
    if (!kWhole && (h0 + i < 0 || h0 + i >= s.H)) continue;
    typename Reads::Inputs x[kInputs];
#pragma GCC unroll 16
    for (int j = 0; j < kInputs; ++j)
      x[j] = kWhole || (w0 + j >= 0 && w0 + j < s.W) ? Reads::read(from + j * step_w) : typename Reads::Inputs{};
#pragma GCC unroll 1
    for (int step = 0; step < Reads::kSteps; ++step) {
      Vec taken[kInputs];
#pragma GCC unroll 16
      for (int j = 0; j < kInputs; ++j) taken[j] = Reads::take(x[j], step);
#pragma GCC unroll 2
      for (int row = 0; row < kTileRows; ++row) {
        const int r = i - row * kStride;
        if (r < 0 || r >= kSize || (!kWhole && row >= tile.rows)) continue;
#pragma GCC unroll 8
        for (int t = 0; t < kSize; ++t) {
          const Vec weight = load(weights + ((r * kSize + t) * Reads::kSteps + step) * channels);
#pragma GCC unroll 4
          for (int m = 0; m < kTileColumns; ++m)
            sum[row][m] = Reads::multiply_add(taken[m * kStride + t], weight, sum[row][m]);
        }
      }
    }
  }
  const float* const bias = static_cast<const float*>(call.bias);
  const Vec added = bias == nullptr ? Vec{} : load(bias + c);
#pragma GCC unroll 2
  for (int row = 0; row < kTileRows; ++row)
#pragma GCC unroll 4
    for (int m = 0; m < kTileColumns; ++m)
      if (kWhole || (row < tile.rows && m < tile.count))
        finish(out, tile.y + row * tile.step_p + m * tile.step_q + c, sum[row][m] + added);
}

template <typename Reads, int kSize, int kStride, typename X, typename Y>
void run_channel_tiles(const ConvShape& s, const float* weights, const ConvCall& call) {
  const Output<Y> out(call);
  const int64_t rows = call.row_count(s), tiles = ceil_div(rows, kTileRows), channels = round_up(s.C, 16);
  const int64_t step_q = call.y_at(s, 0, 0, 1) - call.y_at(s, 0, 0, 0);
  const int64_t step_p = call.y_at(s, 0, 1, 0) - call.y_at(s, 0, 0, 0);
  const auto lies_within = [](int64_t first, int64_t outputs, int64_t size) {
    return first >= 0 && first + (outputs - 1) * kStride + kSize <= size;
  };
#pragma omp parallel for num_threads(call.threads) schedule(static)
  for (int64_t i = 0; i < call.batch(s) * tiles; ++i) {
    const int64_t n = i / tiles, done = i % tiles * kTileRows, p = call.first_row + done;
    const int here = static_cast<int>(std::min<int64_t>(kTileRows, rows - done));
    const bool is_inside = here == kTileRows && lies_within(p * kStride - s.pad_h, here, s.H);
    // Channels innermost, so that memory is read in its order.
    for (int64_t q = 0; q < s.Q; q += kTileColumns) {
      const int count = static_cast<int>(std::min<int64_t>(kTileColumns, s.Q - q));
      const bool is_whole = is_inside && count == kTileColumns && lies_within(q * kStride - s.pad_w, count, s.W);
      const ChannelTile tile{n, p, q, here, count, call.y_at(s, n, p, q), step_p, step_q};
      for (int64_t c = 0; c < s.C; c += kLanes) {
        // What is left of a vector is computed once more with channels before it, to the same bits.
        const int64_t first = std::min(c, s.C - kLanes);
        if (is_whole) run_channel_tile<Reads, kSize, kStride, true, X>(s, weights, channels, call, out, tile, first);
        else run_channel_tile<Reads, kSize, kStride, false, X>(s, weights, channels, call, out, tile, first);
      }
    }
  }
}
