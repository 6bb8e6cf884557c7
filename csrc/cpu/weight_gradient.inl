// How weight_gradient.h lays out pixels and what becomes of the sums; included by each instruction set's own file, after
// sparse_conv2d_block_rows.inl and before the products: weight_gradient_vectors.inl, weight_gradient_amx.inl. A cell is
// float (a word is a pixel of one image) or Bf16 (of two).

// A span's share of what is laid out.
struct GradTile {
  const float* x;        // words of a chunk, at the span's first here
  const int64_t* base;   // by row of grad, words of x further
  const float* grad;     // of the span's block row, as the products want it
  int64_t rows;          // of grad: output pixels, or lines of them
  float* sums;           // of the span
  int64_t pitch;         // from one row of sums to the next
  bool adds = false;     // to the sums, of vectors
};

// The images and output pixels of a tile.
struct GradRange {
  int64_t n0, units, p0, p1, q0, q1;
};

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

// The sums of a block: [channels][bk] or [bk][channels].
struct BlockSums {
  const float* sums;
  int64_t stride_k, stride_c;

  float at(int64_t k, int64_t c) const { return sums[k * stride_k + c * stride_c]; }
};

// Σ weight · sums over a block.
inline double weigh_block(const MaskedWeight& w, const BlockGradPlan::Block& block, const BlockSums& sums) {
  const float* weight = w.weight + block.k0 * w.stride_k + block.c0 * w.stride_c + block.tap * w.stride_tap;
  double part[4] = {};
  for (int64_t k = 0; k < block.filters; ++k)
    for (int64_t c = 0; c < block.channels; ++c)
      part[c % 4] += static_cast<double>(weight[k * w.stride_k + c * w.stride_c]) * sums.at(k, c);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// Sums of a tile to (or onto) the packed order [bk][bc]; zeros beyond ragged edges.
inline void store_block(const BlockGradPlan& plan, const BlockGradPlan::Block& block, const BlockSums& sums, bool adds,
                        float* out) {
  if (!adds) zero_cells(out, plan.bk * plan.bc);
  for (int64_t k = 0; k < block.filters; ++k)
    for (int64_t c = 0; c < block.channels; ++c) out[k * plan.bc + c] += sums.at(k, c);
}

// Products: what lays out the output's gradient and multiplies.
template <typename Products, typename X>
void run_typed_grad(const BlockGradPlan& plan, const WeightGradCall& call) {
  const ConvShape& s = plan.shape;
  const int64_t blocks = static_cast<int64_t>(plan.blocks.size()), spans = static_cast<int64_t>(plan.spans.size());
  const int64_t units = (s.N + plan.images - 1) / plan.images;
  const int64_t tiles_p = (s.P + plan.tile_p - 1) / plan.tile_p, tiles_q = (s.Q + plan.tile_q - 1) / plan.tile_q;
  const int64_t tiles = (units + plan.tile_units - 1) / plan.tile_units * tiles_p * tiles_q;
  const int64_t x_floats = s.groups * plan.chunks_per_group * plan.chunk_words();
  const int64_t grad_floats = s.groups * plan.rows_per_group * plan.row_words();
  std::vector<double> scores(call.weight == nullptr ? 0 : blocks, 0.0);
  if (tiles == 0) zero_cells(call.out, blocks * (call.weight == nullptr ? plan.bk * plan.bc : 1));
  int64_t most_words = 0;
  for (const BlockGradPlan::Span& span : plan.spans) most_words = std::max(most_words, span.words);
  const auto whole_lines = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  const int64_t own_floats = whole_lines(most_words) * plan.padded_bk;
  // Of the calling thread: its own sums, then what all read; the last words are read in vectors.
  float* const shared = thread_scratch(own_floats + grad_floats + x_floats + 16);
  float *const grad = shared + own_floats, *const x = grad + grad_floats;
  std::vector<int64_t> base(plan.tile_units * plan.tile_p * plan.tile_q);
#pragma omp parallel num_threads(call.threads)
  {
    const Products products(plan, whole_lines(most_words));
    float* const sums = omp_get_thread_num() == 0 ? shared : thread_scratch(own_floats);
    for (int64_t number = 0; number < tiles; ++number) {
      const int64_t u0 = number / (tiles_p * tiles_q) * plan.tile_units;
      const int64_t p0 = number / tiles_q % tiles_p * plan.tile_p, q0 = number % tiles_q * plan.tile_q;
      const GradRange tile{u0 * plan.images, std::min(plan.tile_units, units - u0),
                           p0, std::min(p0 + plan.tile_p, s.P), q0, std::min(q0 + plan.tile_q, s.Q)};
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < tile.units * plan.rows; ++i)
        load_input_row<typename Products::Cell, X>(plan, call, tile, i / plan.rows, i % plan.rows, x);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < products.loads(tile); ++i)
        products.template load_gradient<X>(call, tile, i, grad, base.data());
#pragma omp for schedule(static)
      for (int64_t i = 0; i < spans; ++i) {
        const BlockGradPlan::Span& span = plan.spans[i];
        const BlockGradPlan::Block& first = plan.blocks[span.first];
        products.multiply_span(span, {x + first.chunk * plan.chunk_words() + first.offset, base.data(),
                                      grad + first.row * plan.row_words(), products.rows(tile), sums, products.pitch});
        BlockSums of_block{sums, products.stride_k, products.stride_c};
        for (int64_t b = span.first; b < span.first + span.blocks; ++b) {
          const BlockGradPlan::Block& block = plan.blocks[b];
          if (call.weight != nullptr) scores[b] += weigh_block(*call.weight, block, of_block);
          else store_block(plan, block, of_block, number > 0, call.out + b * plan.bk * plan.bc);
          of_block.sums += block.channels * of_block.stride_c;
        }
      }
    }
  }
  for (int64_t i = 0; i < static_cast<int64_t>(scores.size()); ++i) call.out[i] = static_cast<float>(scores[i]);
}

template <typename Products>
void run_block_grad(const BlockGradPlan& plan, const WeightGradCall& call) {
  if constexpr (std::is_same_v<typename Products::Cell, Bf16>) run_typed_grad<Products, Bf16>(plan, call);
  else if (call.dtype == DType::kBF16) run_typed_grad<Products, Bf16>(plan, call);
  else if (call.dtype == DType::kF16) run_typed_grad<Products, Fp16>(plan, call);
  else run_typed_grad<Products, float>(plan, call);
}
