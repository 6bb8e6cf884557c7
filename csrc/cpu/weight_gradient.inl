// The loops of weight_gradient.h for one vector length; included by each instruction set's own file, after
// sparse_conv2d_block.inl. A cell is float (a word is a pixel of one image) or Bf16 (of two).

struct GradTile {
  const float* x;        // words of a chunk, at the span's first here
  const int64_t* pixel;  // by output pixel, words from the base
  const float* grad;     // words [pixels][grad_pitch], at the block's first output channel here
  int64_t pixels, grad_pitch, sum_pitch;
  float* sums;  // [words][sum_pitch]
};

// sums[c][k] = Σ over the tile's pixels of x[pixel][c] · grad[pixel][k], kWords × kVectors vectors in registers.
template <typename Cell, int kWords, int kVectors>
void add_outer_products(const GradTile& tile) {
  Vec sum[kWords][kVectors] = {};
  const float* grad = tile.grad;
  for (int64_t m = 0; m < tile.pixels; ++m, grad += tile.grad_pitch) {
    const float* x = tile.x + tile.pixel[m];
    Vec g[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) g[v] = load(grad + v * kLanes);
#pragma GCC unroll 16
    for (int c = 0; c < kWords; ++c) {
      uint32_t word;
      std::memcpy(&word, x + c, sizeof word);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[c][v] = multiply_add(Cell{}, word, g[v], sum[c][v]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kWords; ++c)
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) store(tile.sums + c * tile.sum_pitch + v * kLanes, sum[c][v]);
}

using AddOuterProducts = void (*)(const GradTile&);
template <typename Cell, int kVectors, int... kWords>
constexpr std::array<AddOuterProducts, sizeof...(kWords)> outer_table(std::integer_sequence<int, kWords...>) {
  return {add_outer_products<Cell, kWords + 1, kVectors>...};
}
template <typename Cell, int kVectors>
constexpr auto kOuter = outer_table<Cell, kVectors>(std::make_integer_sequence<int, kBlockPixels>{});

// The sums [words][padded_bk] of a span over the tile's pixels.
template <typename Cell>
void multiply_span(const BlockGradPlan& plan, const BlockGradPlan::Span& span, GradTile tile) {
  const float *x = tile.x, *grad = tile.grad;
  float* sums = tile.sums;
  const int64_t shares = (span.words + kBlockPixels - 1) / kBlockPixels;
  for (int64_t k = 0; k < plan.padded_bk; k += 2 * kLanes) {
    const auto& table = plan.padded_bk - k > kLanes ? kOuter<Cell, 2> : kOuter<Cell, 1>;
    for (int64_t share = 0; share < shares; ++share) {
      const int64_t c = span.words * share / shares;
      tile.x = x + c;
      tile.grad = grad + k;
      tile.sums = sums + c * tile.sum_pitch + k;
      table[span.words * (share + 1) / shares - c - 1](tile);
    }
  }
}

// Words of `count` channels of a pixel; `second` is the other image's pixel, null where there is none.
template <typename Cell, typename X>
inline void copy_words(const X* first, const X* second, int64_t count, float* to) {
  int64_t c = 0;
  if constexpr (std::is_same_v<Cell, float>) {
    if constexpr (std::is_same_v<X, float>)
      for (; c + kLanes <= count; c += kLanes) store(to + c, load(first + c));
    for (; c + 8 <= count; c += 8) store8(to + c, load8(first + c));
    for (; c < count; ++c) to[c] = widen(first[c]);
  } else {
    using Words = uint32_t __attribute__((vector_size(kLanes * 4)));
    using Halves = uint16_t __attribute__((vector_size(kLanes * 2)));
    for (; c + kLanes <= count; c += kLanes) {
      Halves low, high{};
      std::memcpy(&low, first + c, sizeof low);
      if (second != nullptr) std::memcpy(&high, second + c, sizeof high);
      const Words words = __builtin_convertvector(low, Words) | __builtin_convertvector(high, Words) << 16;
      std::memcpy(to + c, &words, sizeof words);
    }
    for (; c < count; ++c) {
      const uint32_t word = first[c].bits | (second != nullptr ? static_cast<uint32_t>(second[c].bits) << 16 : 0u);
      std::memcpy(to + c, &word, sizeof word);
    }
  }
}

// The images and output pixels of a tile.
struct GradRange {
  int64_t n0, units, p0, p1, q0, q1;
};

// Row `row` of the planes of the tile's unit `unit`, in all chunks.
template <typename Cell, typename X>
void load_input_row(const BlockGradPlan& plan, const WeightGradCall& call, const GradRange& tile, int64_t unit,
                    int64_t row, float* x) {
  const ConvShape& s = plan.shape;
  const int64_t n = tile.n0 + unit * plan.images, cols = plan.cols, skip = plan.w.skip, width = plan.chunk_channels;
  const int64_t h = tile.p0 * s.stride_h - s.pad_h + row * plan.h.skip, w0 = tile.q0 * s.stride_w - s.pad_w;
  const int64_t left = std::min(cols, w0 < 0 ? (-w0 + skip - 1) / skip : 0);
  const int64_t right = std::clamp(s.W > w0 ? (s.W - w0 + skip - 1) / skip : 0, left, cols);
  const bool inside = h >= 0 && h < s.H;
  const X* const first = static_cast<const X*>(call.x) + n * call.x_stride_n + h * call.x_stride_h + (w0 + left * skip) * call.x_stride_w;
  const X* const second = plan.images == 2 && n + 1 < s.N ? first + call.x_stride_n : nullptr;
  const bool side_by_side = skip == 1 && call.x_stride_w == width && s.groups * plan.chunks_per_group == 1;
  for (int64_t chunk = 0; chunk < s.groups * plan.chunks_per_group; ++chunk) {
    float* to = x + chunk * plan.chunk_words() + (unit * plan.rows + row) * cols * width;
    if (!inside) {
      zero_cells(to, cols * width);
      continue;
    }
    zero_cells(to, left * width);
    zero_cells(to + right * width, (cols - right) * width);
    to += left * width;
    const int64_t c0 = chunk % plan.chunks_per_group * plan.bc, channels = s.C / s.groups;
    const int64_t at = chunk / plan.chunks_per_group * channels + c0, count = std::min(width, channels - c0);
    if (side_by_side) {
      copy_words<Cell>(first, second, (right - left) * width, to);
      continue;
    }
    for (int64_t col = 0; col < right - left; ++col, to += width) {
      const int64_t from = at + col * skip * call.x_stride_w;
      copy_words<Cell>(first + from, second != nullptr ? second + from : nullptr, count, to);
    }
  }
}

// Row p of the gradient of the tile's unit, in all block rows; zeros beyond ragged ones.
template <typename Cell, typename X>
void load_gradient_row(const BlockGradPlan& plan, const WeightGradCall& call, const GradRange& tile, int64_t unit,
                       int64_t p, float* grad) {
  const ConvShape& s = plan.shape;
  const int64_t n = tile.n0 + unit * plan.images, filters = s.K / s.groups;
  const int64_t pixels = (tile.p1 - tile.p0) * (tile.q1 - tile.q0);
  const int64_t before = unit * pixels + (p - tile.p0) * (tile.q1 - tile.q0);
  for (int64_t row = 0; row < s.groups * plan.rows_per_group; ++row) {
    const int64_t k = row % plan.rows_per_group * plan.bk, count = std::min(plan.bk, filters - k);
    float* to = grad + row * plan.row_words() + before * plan.padded_bk;
    const X* first = static_cast<const X*>(call.grad) + ((n * s.P + p) * s.Q + tile.q0) * s.K +
                     row / plan.rows_per_group * filters + k;
    const X* second = plan.images == 2 && n + 1 < s.N ? first + s.P * s.Q * s.K : nullptr;
    for (int64_t q = tile.q0; q < tile.q1; ++q, first += s.K, to += plan.padded_bk) {
      copy_words<Cell>(first, second, count, to);
      if (count < plan.padded_bk) zero_cells(to + count, plan.padded_bk - count);
      if (second != nullptr) second += s.K;
    }
  }
}

// Σ weight · sums over a block.
inline double weigh_block(const MaskedWeight& w, const BlockGradPlan::Block& block, const float* sums, int64_t pitch) {
  const float* weight = w.weight + block.k0 * w.stride_k + block.c0 * w.stride_c + block.tap * w.stride_tap;
  double part[4] = {};
  for (int64_t k = 0; k < block.filters; ++k)
    for (int64_t c = 0; c < block.channels; ++c)
      part[c % 4] += static_cast<double>(weight[k * w.stride_k + c * w.stride_c]) * sums[c * pitch + k];
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// Sums [channels][pitch] of a tile to (or onto) the packed order [bk][bc]; zeros beyond ragged edges.
inline void store_block(const BlockGradPlan& plan, const BlockGradPlan::Block& block, const float* sums, bool adds,
                        float* out) {
  if (!adds) zero_cells(out, plan.bk * plan.bc);
  for (int64_t k = 0; k < block.filters; ++k)
    for (int64_t c = 0; c < block.channels; ++c) out[k * plan.bc + c] += sums[c * plan.padded_bk + k];
}

template <typename Cell, typename X>
void run_typed_grad(const BlockGradPlan& plan, const WeightGradCall& call) {
  const ConvShape& s = plan.shape;
  const int64_t blocks = static_cast<int64_t>(plan.blocks.size()), spans = static_cast<int64_t>(plan.spans.size());
  const int64_t units = (s.N + plan.images - 1) / plan.images;
  const int64_t tiles_p = (s.P + plan.tile_p - 1) / plan.tile_p, tiles_q = (s.Q + plan.tile_q - 1) / plan.tile_q;
  const int64_t tiles = (units + plan.tile_units - 1) / plan.tile_units * tiles_p * tiles_q;
  const int64_t tile_pixels = plan.tile_units * plan.tile_p * plan.tile_q;
  const int64_t x_floats = s.groups * plan.chunks_per_group * plan.chunk_words();
  const int64_t grad_floats = s.groups * plan.rows_per_group * plan.row_words();
  std::vector<double> scores(call.weight == nullptr ? 0 : blocks, 0.0);
  if (tiles == 0) zero_cells(call.out, blocks * (call.weight == nullptr ? plan.bk * plan.bc : 1));
  int64_t most_words = 0;
  for (const BlockGradPlan::Span& span : plan.spans) most_words = std::max(most_words, span.words);
  const int64_t own_floats = (most_words * plan.padded_bk + 15) / 16 * 16;
  // Of the calling thread: what all read, then its own sums.
  const int64_t shared_floats = (x_floats + grad_floats + 2 * tile_pixels + 15) / 16 * 16;
  float* const shared = thread_scratch(own_floats + shared_floats);
  float *const grad = shared + own_floats, *const x = grad + grad_floats;
  std::vector<int64_t> base(tile_pixels);
#pragma omp parallel num_threads(call.threads)
  {
    float* const sums = omp_get_thread_num() == 0 ? shared : thread_scratch(own_floats);
    for (int64_t number = 0; number < tiles; ++number) {
      const int64_t u0 = number / (tiles_p * tiles_q) * plan.tile_units;
      const int64_t p0 = number / tiles_q % tiles_p * plan.tile_p, q0 = number % tiles_q * plan.tile_q;
      const GradRange tile{u0 * plan.images, std::min(plan.tile_units, units - u0),
                           p0, std::min(p0 + plan.tile_p, s.P), q0, std::min(q0 + plan.tile_q, s.Q)};
      const int64_t height = tile.p1 - p0, width = tile.q1 - q0;
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < tile.units * plan.rows; ++i)
        load_input_row<Cell, X>(plan, call, tile, i / plan.rows, i % plan.rows, x);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tile.units * height; ++i) {
        const int64_t unit = i / height, p = i % height;
        load_gradient_row<Cell, X>(plan, call, tile, unit, p0 + p, grad);
        for (int64_t q = 0; q < width; ++q)
          base[i * width + q] = ((unit * plan.rows + p * plan.h.step) * plan.cols + q * plan.w.step) * plan.chunk_channels;
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < spans; ++i) {
        const BlockGradPlan::Span& span = plan.spans[i];
        const BlockGradPlan::Block& first = plan.blocks[span.first];
        multiply_span<Cell>(plan, span,
                            {x + first.chunk * plan.chunk_words() + first.offset, base.data(),
                             grad + first.row * plan.row_words(), tile.units * height * width, plan.padded_bk,
                             plan.padded_bk, sums});
        const float* of_block = sums;
        for (int64_t b = span.first; b < span.first + span.blocks; ++b) {
          const BlockGradPlan::Block& block = plan.blocks[b];
          if (call.weight != nullptr) scores[b] += weigh_block(*call.weight, block, of_block, plan.padded_bk);
          else store_block(plan, block, of_block, number > 0, call.out + b * plan.bk * plan.bc);
          of_block += block.channels * plan.padded_bk;
        }
      }
    }
  }
  for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) call.out[i] = static_cast<float>(scores[i]);
}

template <typename Cell>
void run_block_grad(const BlockGradPlan& plan, const WeightGradCall& call) {
  if constexpr (std::is_same_v<Cell, Bf16>) run_typed_grad<Cell, Bf16>(plan, call);
  else if (call.dtype == DType::kBF16) run_typed_grad<Cell, Bf16>(plan, call);
  else if (call.dtype == DType::kF16) run_typed_grad<Cell, Fp16>(plan, call);
  else run_typed_grad<Cell, float>(plan, call);
}
