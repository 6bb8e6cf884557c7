// The loop of sparse_conv2d_block.h for one vector length; included by each instruction set's own file after
// sparse_conv2d_block_rows.inl. Needs VPNS_LANES and VPNS_BLOCK_PIXELS.

constexpr int kBlockPixels = VPNS_BLOCK_PIXELS;
// Pixels whose sums are in registers at a time, by their vectors.
constexpr int kStripPixels[] = {0, 2 * kBlockPixels, kBlockPixels, 2 * kBlockPixels / 3};
// Where weights stay in registers: pixels whose sums are in registers at a time, and pixels for which they stay.
constexpr int64_t kBlockAbreast = 4, kBlockStream = 64;

// sum + x · w for one word of the input and a word of weights in each lane.
inline Vec multiply_add(float, uint32_t x, Vec w, Vec sum) { return sum + broadcast(__builtin_bit_cast(float, x)) * w; }
#if defined(__AVX512BF16__)
inline Vec multiply_add(Bf16, uint32_t x, Vec w, Vec sum) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
}
#else
inline Vec multiply_add(Bf16, uint32_t x, Vec w, Vec sum) {
  using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
  const Words bits = (Words)w;
  sum += broadcast(__builtin_bit_cast(float, x & 0xffff0000u)) * (Vec)(bits & 0xffff0000u);
  return sum + broadcast(__builtin_bit_cast(float, x << 16)) * (Vec)(bits << 16);
}
#endif

// Some output pixels × a group of runs.
struct BlockTile {
  const void* x;         // base of the planes
  const int64_t* pixel;  // by output pixel, cells from the base
  const BlockRun* runs;
  int64_t run_count;
  const uint32_t* weights;
  float* sums;  // [pixels][lanes of the strip]
  bool adds;    // to the sums of the groups before
  BlockOutputs outputs;
};

// sums[m][k] = (or +=) Σ_words x[m][word] · w[word][k] for kPixels pixels and kVectors vectors of output channels;
// finished, where they are the last and all outputs are there.
template <typename Cell, typename Y, int kVectors, int kPixels>
void multiply_runs(const BlockTile& tile) {
  constexpr int64_t kCells = 4 / sizeof(Cell);
  Vec sum[kPixels][kVectors] = {};
  const float* weights = reinterpret_cast<const float*>(tile.weights);
  for (int64_t run = 0; run < tile.run_count; ++run) {
    const Cell* x[kPixels];
#pragma GCC unroll 24
    for (int m = 0; m < kPixels; ++m)
      x[m] = static_cast<const Cell*>(tile.x) + tile.pixel[m] + tile.runs[run].offset;
    const int64_t cells = tile.runs[run].words * kCells, last = cells - kCells - tile.runs[run].shared;
    for (int64_t next = 0; next < cells; next += kCells, weights += kVectors * kLanes) {
      const int64_t c = std::min(next, last);
      Vec w[kVectors];
#pragma GCC unroll 24
      for (int v = 0; v < kVectors; ++v) w[v] = load(weights + v * kLanes);
#pragma GCC unroll 24
      for (int m = 0; m < kPixels; ++m) {
        uint32_t word;
        std::memcpy(&word, x[m] + c, sizeof word);
#pragma GCC unroll 24
        for (int v = 0; v < kVectors; ++v) sum[m][v] = multiply_add(Cell{}, word, w[v], sum[m][v]);
      }
    }
  }
  if (tile.adds) {
#pragma GCC unroll 24
    for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 24
      for (int v = 0; v < kVectors; ++v) sum[m][v] += load(tile.sums + (m * kVectors + v) * kLanes);
  }
  const BlockOutputs& to = tile.outputs;
  if (to.target != nullptr) {
    const Output<Y> out(*to.call);
    const float* bias = to.call->bias ? static_cast<const float*>(to.call->bias) + to.k0 : nullptr;
#pragma GCC unroll 24
    for (int m = 0; m < kPixels; ++m) finish_vectors(out, to.target[m] + to.k0, sum[m], bias, to.streams);
    return;
  }
#pragma GCC unroll 24
  for (int m = 0; m < kPixels; ++m)
#pragma GCC unroll 24
    for (int v = 0; v < kVectors; ++v) store(tile.sums + (m * kVectors + v) * kLanes, sum[m][v]);
}

// sums[m][k] += Σ_words x[m][word] · w[word][k] for kWords neighbouring words, kPixels pixels from `pixel` on, and one
// vector of output channels.
template <typename Cell, int kWords, int kPixels>
inline void multiply_pixels(const BlockTile& tile, int64_t pixel, const Cell* base, const Vec (&w)[kWords]) {
  constexpr int64_t kCells = 4 / sizeof(Cell);
  float* const sums = tile.sums + pixel * 2 * kLanes;
  const Cell* x[kPixels];
  Vec sum[kPixels];
#pragma GCC unroll 16
  for (int m = 0; m < kPixels; ++m) {
    x[m] = base + tile.pixel[pixel + m];
    sum[m] = load(sums + m * 2 * kLanes);
  }
#pragma GCC unroll 16
  for (int word = 0; word < kWords; ++word)
#pragma GCC unroll 16
    for (int m = 0; m < kPixels; ++m) {
      uint32_t both;
      std::memcpy(&both, x[m] + word * kCells, sizeof both);
      sum[m] = multiply_add(Cell{}, both, w[word], sum[m]);
    }
#pragma GCC unroll 16
  for (int m = 0; m < kPixels; ++m) store(sums + m * 2 * kLanes, sum[m]);
}

// The same for any number of pixels, as many at a time as hide the latency of the additions.
template <typename Cell, int kWords>
void multiply_words(const BlockTile& tile, int64_t pixels, int64_t offset, const uint32_t* weights) {
  Vec w[kWords];
#pragma GCC unroll 16
  for (int word = 0; word < kWords; ++word) w[word] = load(reinterpret_cast<const float*>(weights) + word * kLanes);
  const Cell* const base = static_cast<const Cell*>(tile.x) + offset;
  int64_t pixel = 0;
  for (; pixel + kLanes / 2 <= pixels; pixel += kLanes / 2)
    multiply_pixels<Cell, kWords, kLanes / 2>(tile, pixel, base, w);
  for (; pixel < pixels; pixel += kBlockAbreast) multiply_pixels<Cell, kWords, kBlockAbreast>(tile, pixel, base, w);
}

using MultiplyRuns = void (*)(const BlockTile&);
template <typename Cell, typename Y, int kVectors, int... kPixels>
constexpr std::array<MultiplyRuns, sizeof...(kPixels)> runs_table(std::integer_sequence<int, kPixels...>) {
  return {multiply_runs<Cell, Y, kVectors, kPixels + 1>...};
}
template <typename Cell, int... kWords>
constexpr auto words_table(std::integer_sequence<int, kWords...>) {
  return std::array{multiply_words<Cell, kWords + 1>...};
}
template <typename Cell, typename Y, int kVectors>  // by pixels less one
constexpr auto kMultiplyRuns = runs_table<Cell, Y, kVectors>(std::make_integer_sequence<int, kStripPixels[kVectors]>{});
template <typename Cell>
constexpr auto kMultiplyWords = words_table<Cell>(std::make_integer_sequence<int, kLanes>{});

// One vector of output channels of a group, for whole sets of pixels.
template <typename Cell>
void multiply_group(BlockTile tile, int64_t pixels) {
  alignas(64) float own[kBlockStream * 2 * kLanes];
  float* const sums = tile.sums;
  if (tile.adds) tile.sums = own;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) store(tile.sums + pixel * 2 * kLanes, Vec{});
  const uint32_t* weights = tile.weights;
  for (int64_t i = 0; i < tile.run_count; ++i) {
    const BlockRun& run = tile.runs[i];
    const int64_t words = run.words - run.shared;
    for (int64_t word = 0; word < words; word += kLanes) {
      const int64_t count = std::min<int64_t>(words - word, kLanes);
      kMultiplyWords<Cell>[count - 1](tile, pixels, run.offset + word * (4 / sizeof(Cell)), weights);
      weights += count * kLanes;
    }
    if (run.shared == 0) continue;
    kMultiplyWords<Cell>[0](tile, pixels, run.offset + words * (4 / sizeof(Cell)) - 1, weights);
    weights += kLanes;
  }
  if (!tile.adds) return;
  for (int64_t i = 0; i < pixels * 2 * kLanes; i += 2 * kLanes) store(sums + i, load(sums + i) + load(own + i));
}

using LoadRows = void (*)(const BlockPlan&, const ConvCall&, int64_t n, int64_t p0, int64_t q0, int64_t rows,
                          void* planes);
using StoreSums = void (*)(const BlockPlan&, const ConvCall&, const BlockStrip&, const float* sums,
                           const int64_t* target, int64_t pixels);

template <typename Cell>
LoadRows pick_load(const ConvCall& call) {
  if constexpr (std::is_same_v<Cell, Bf16>) return load_rows<Bf16, Bf16>;
  else if (call.x_dtype == DType::kBF16) return load_rows<float, Bf16>;
  else return call.x_dtype == DType::kF16 ? load_rows<float, Fp16> : load_rows<float, float>;
}

// What depends on the type of the outputs.
struct ForOutputs {
  std::array<const MultiplyRuns*, 4> multiply;  // by vectors
  StoreSums store;
};

template <typename Cell, typename Y>
constexpr ForOutputs kForOutputs{
    {nullptr, kMultiplyRuns<Cell, Y, 1>.data(), kMultiplyRuns<Cell, Y, 2>.data(), kMultiplyRuns<Cell, Y, 3>.data()},
    store_sums<Y>};

template <typename Cell>
const ForOutputs& pick_outputs(const ConvCall& call) {
  if (call.y_dtype == DType::kBF16) return kForOutputs<Cell, Bf16>;
  return call.y_dtype == DType::kF16 ? kForOutputs<Cell, Fp16> : kForOutputs<Cell, float>;
}

// The output pixels of a piece: where each reads and writes.
struct BlockPixels {
  int64_t* base;    // cells from the base of the planes
  int64_t* target;  // its first output channel, elements from the base of y
  int64_t count;
};

// All pixels of a piece × one strip.
template <typename Cell>
void run_strip(const BlockPlan& plan, const ConvCall& call, const BlockStrip& strip, const void* x,
               const BlockPixels& pixels, const ForOutputs& outputs, PhaseClock& clock) {
  alignas(64) float sums[std::max<int64_t>(kBlockPixels, kBlockStream) * 2 * kLanes];
  const BlockGroup* const groups = plan.groups.data() + strip.first_group;
  // Equal shares of pixels, so that no share has too few sums to hide the latency of the additions.
  const bool in_registers = strip.vectors > 0;
  const int64_t most = in_registers ? kStripPixels[strip.vectors] : kBlockStream;
  const int64_t shares = ceil_div(pixels.count, most);
  const bool is_whole = in_registers && strip.span == strip.vectors * kLanes && strip.count == strip.span;
  const bool streams = streams_outputs(plan, call);
  for (int64_t share = 0, begin = 0; share < shares; ++share) {
    const int64_t end = in_registers ? pixels.count * (share + 1) / shares : std::min(begin + most, pixels.count);
    const int64_t size = end - begin, whole = round_up(size, kBlockAbreast);
    for (int64_t i = 0; i < strip.groups; ++i) {
      const BlockGroup& group = groups[i];
      const BlockTile tile{
          x,
          pixels.base + begin,
          plan.runs.data() + group.first_run,
          group.runs,
          plan.weights.data() + group.weights,
          sums + group.vector * kLanes,
          i > 0 && group.vector == groups[i - 1].vector,
          {&call, is_whole && i + 1 == strip.groups ? pixels.target + begin : nullptr, strip.k0, streams}};
      if (in_registers) outputs.multiply[strip.vectors][size - 1](tile);
      else multiply_group<Cell>(tile, whole);
    }
    clock.ends(kProducts);
    if (!is_whole) outputs.store(plan, call, strip, sums, pixels.target + begin, size);
    clock.ends(kStores);
    begin = end;
  }
}

// All outputs of a call whose planes are call.x itself (in_place), or what load(n, p0, q0, rows, planes) lays out: the
// first rows of the planes of the tile at output (p0, q0) of image n.
template <typename Cell, typename Load>
void run_block_of(const BlockPlan& plan, const ConvCall& call, bool in_place, const Load& load) {
  const ConvShape& s = plan.shape;
  const BlockTasks cut = cut_tasks(plan, call);
  if (cut.pieces() == 0) return;
  const ForOutputs& outputs = pick_outputs<Cell>(call);
  const int64_t tile_n = ceil_div(call.batch(s), cut.groups), tile_p = ceil_div(call.row_count(s), cut.tiles_p);
  const int64_t pixel_cells = s.groups * plan.group_cells;
  const int64_t image_cells = plan.h.extent(tile_p) * plan.cols * pixel_cells;
  const int64_t pixel_room = round_up(tile_n * tile_p * plan.tile_q + kBlockAbreast, 16);
  const int64_t plane_floats = in_place ? 0 : ceil_div(tile_n * image_cells * plan.cell_bytes, 256) * 64;
  TaskQueue tasks(cut.whole, cut.count() - cut.whole, call.threads);
#pragma omp parallel num_threads(call.threads)
  {
    float* const memory = thread_scratch(4 * pixel_room + plane_floats);
    BlockPixels pixels{reinterpret_cast<int64_t*>(memory), reinterpret_cast<int64_t*>(memory) + pixel_room, 0};
    Cell* const planes = reinterpret_cast<Cell*>(memory + 4 * pixel_room);
    const void* const x = in_place ? call.x : planes;
    PhaseClock clock(call);
    const auto lay_out = [&](const BlockPiece& piece) {
      pixels.count = 0;
      for (int64_t n = piece.n0; n < piece.n1; ++n) {
        Cell* const image = planes + (n - piece.n0) * image_cells;
        if (!in_place) load(n, piece.p0, piece.q0, plan.h.extent(piece.p1 - piece.p0), image);
        for (int64_t p = piece.p0; p < piece.p1; ++p)
          for (int64_t q = piece.q0; q < piece.q1; ++q, ++pixels.count) {
            const int64_t row = (p - piece.p0) * plan.h.step, col = (q - piece.q0) * plan.w.step;
            pixels.base[pixels.count] =
                in_place ? n * call.x_stride_n + p * s.stride_h * call.x_stride_h + q * s.stride_w * call.x_stride_w
                         : image - planes + (row * plan.cols + col) * pixel_cells;
            pixels.target[pixels.count] = call.y_at(s, n, p, q);
          }
      }
      // Strips of one vector take whole groups of pixels, the last of which may be there several times.
      for (int64_t more = 0; more < kBlockAbreast; ++more)
        pixels.base[pixels.count + more] = pixels.base[pixels.count - 1];
      clock.ends(kLayout);
    };
    int64_t laid_out = -1;
    for (int64_t task; (task = tasks.take(omp_get_thread_num())) >= 0;) {
      const bool is_whole = task < cut.whole;
      const int64_t piece = is_whole ? task : cut.whole + (task - cut.whole) / cut.parts;
      const int64_t part = is_whole ? 0 : (task - cut.whole) % cut.parts, parts = is_whole ? 1 : cut.parts;
      if (piece != laid_out) lay_out(find_piece(plan, call, cut, piece));
      laid_out = piece;
      const int64_t last = first_strip(plan, part + 1, parts);
      for (int64_t strip = first_strip(plan, part, parts); strip < last; ++strip)
        run_strip<Cell>(plan, call, plan.strips[strip], x, pixels, outputs, clock);
    }
    end_streams();
  }
}

template <typename Cell>
void run_block(const BlockPlan& plan, const ConvCall& call) {
  const bool in_place = plan.may_read_in_place && call.x_dtype == (sizeof(Cell) == 4 ? DType::kF32 : DType::kBF16);
  const LoadRows load = pick_load<Cell>(call);
  run_block_of<Cell>(plan, call, in_place, [&](int64_t n, int64_t p0, int64_t q0, int64_t rows, Cell* planes) {
    load(plan, call, n, p0, q0, rows, planes);
  });
}
