// How weight_gradient.h lays out pixels and what becomes of the sums; included by each instruction set's own file,
// after sparse_conv2d_block_rows.inl and before the products: weight_gradient_vectors.inl, weight_gradient_amx.inl. A
// cell is float (a word is a pixel of one image) or Bf16 (of two).

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
  const int64_t left = std::min(cols, w0 < 0 ? ceil_div(-w0, skip) : 0);
  const int64_t right = std::clamp(s.W > w0 ? ceil_div(s.W - w0, skip) : 0, left, cols);
  const bool inside = h >= 0 && h < s.H;
  const X* const first =
      static_cast<const X*>(call.x) + n * call.x_stride_n + h * call.x_stride_h + (w0 + left * skip) * call.x_stride_w;
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

// Sums of a kept block to the packed order [bk][bc]; zeros beyond ragged edges.
inline void store_block(const BlockGradPlan& plan, const BlockGradPlan::Block& block, const BlockSums& sums,
                        float* out) {
  if (block.filters < plan.bk || block.channels < plan.bc) zero_cells(out, plan.bk * plan.bc);
  for (int64_t k = 0; k < block.filters; ++k)
    for (int64_t c = 0; c < block.channels; ++c) out[k * plan.bc + c] = sums.at(k, c);
}

// sign(S) · W · dW of the single weights of a block, filter by filter as they lie.
inline void weigh_singles(const BlockGradPlan& plan, const WeightGradCall& call, const BlockGradPlan::Block& block,
                          int64_t k, const BlockSums& sums) {
  const MaskedWeight& w = *call.weight;
  const int64_t taps = plan.shape.R * plan.shape.S, channels = plan.shape.C / plan.shape.groups;
  const int64_t at = ((block.k0 + k) * channels + block.c0) * taps + block.tap;
  const float* weight = w.weight + (block.k0 + k) * w.stride_k + block.c0 * w.stride_c + block.tap * w.stride_tap;
  for (int64_t c = 0; c < block.channels; ++c) {
    const float score = call.scores[at + c * taps], sign = score > 0 ? 1.0f : score < 0 ? -1.0f : score;
    call.out[at + c * taps] = sign * (weight[c * w.stride_c] * sums.at(k, c));
  }
}

// One call. Its tiles are cut into slices, which have sums of their own, added up in their order: so threads may take
// slices of their own or, where slices are few and sums are large, spans of every slice, with the same result. Nobody
// waits: what a thread lays out it alone reads, for to fetch what another core has just written takes longer.
//
// Products: what lays out the output's gradient and multiplies.
template <typename Products, typename X>
class BlockGradRun {
 public:
  BlockGradRun(const BlockGradPlan& plan, const WeightGradCall& call) : plan_(plan), call_(call), s_(plan.shape) {
    units_ = ceil_div(s_.N, plan.images);
    tiles_p_ = ceil_div(s_.P, plan.tile_p);
    tiles_q_ = ceil_div(s_.Q, plan.tile_q);
    tiles_ = ceil_div(units_, plan.tile_units) * tiles_p_ * tiles_q_;
    singles_ = call.scores != nullptr;
    sums_blocks_ = call.weight != nullptr && !singles_;
    blocks_ = static_cast<int64_t>(plan.blocks.size());
    taps_ = plan.count == 0 ? 1 : s_.R * s_.S * blocks_ / plan.count;
    spans_ = static_cast<int64_t>(plan.spans.size());
    int64_t most_words = 0;
    for (const BlockGradPlan::Span& span : plan.spans) most_words = std::max(most_words, span.words);
    most_words_ = whole_lines(most_words);
    span_floats_ = most_words_ * plan.padded_bk;
    slices_ = tiles_;
    if (sums_blocks_ || tiles_ == 0) return;
    const int64_t most =
        std::clamp<int64_t>(kSliceFloats / std::max<int64_t>(spans_ * span_floats_, 1), 1, kMostSlices);
    // A power of two, so that as many threads have equal shares.
    slices_ = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(std::min(most, tiles_))));
  }

  void run() {
    if (tiles_ == 0 || blocks_ < plan_.count) {
      const int64_t singles = s_.K * (s_.C / s_.groups) * s_.R * s_.S;
      zero_cells(call_.out, singles_ ? singles : sums_blocks_ ? plan_.count : plan_.count * plan_.bk * plan_.bc);
    }
    if (tiles_ == 0 || blocks_ == 0) return;
    const int64_t x_floats = s_.groups * plan_.chunks_per_group * plan_.chunk_words();
    const int64_t grad_floats = whole_lines(s_.groups * plan_.rows_per_group * plan_.row_words());
    // The last words are read in vectors.
    const int64_t tile_floats = grad_floats + whole_lines(x_floats) + 16;
    const int64_t kept_floats = sums_blocks_ ? 0 : slices_ * spans_ * span_floats_;
    const bool own_slices = slices_ % call_.threads == 0 || slices_ >= 4 * call_.threads;
    // Of the calling thread: what all read.
    float* const shared = thread_scratch(kept_floats + span_floats_ + tile_floats);
    std::vector<double> scores(sums_blocks_ ? slices_ * blocks_ : 0);
#pragma omp parallel num_threads(call_.threads)
    {
      const Products products(plan_, most_words_);
      const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
      float* const own = part == 0 ? shared + kept_floats : thread_scratch(span_floats_ + tile_floats);
      float* const laid_out = own + span_floats_;
      std::vector<int64_t> base(plan_.tile_units * plan_.tile_p * plan_.tile_q);
      Work work{laid_out, laid_out + grad_floats, base.data(), own, nullptr, nullptr, false};
      const int64_t first_slice = own_slices ? slices_ * part / parts : 0;
      const int64_t end_slice = own_slices ? slices_ * (part + 1) / parts : slices_;
      const int64_t first_span = own_slices ? 0 : spans_ * part / parts;
      const int64_t end_span = own_slices ? spans_ : spans_ * (part + 1) / parts;
      for (int64_t slice = first_slice; slice < end_slice; ++slice) {
        if (sums_blocks_) work.scores = scores.data() + slice * blocks_;
        else work.kept = shared + slice * spans_ * span_floats_;
        const int64_t first = tiles_ * slice / slices_;
        for (int64_t number = first; number < tiles_ * (slice + 1) / slices_; ++number) {
          work.adds = number > first;
          const GradRange tile = range(number);
          lay_out(products, tile, work);
          multiply(products, tile, work, first_span, end_span);
        }
      }
#pragma omp barrier
      if (sums_blocks_) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks_; ++b) add_scores(scores, b);
      } else {
        finish(products, shared);
      }
    }
  }

 private:
  // What a thread works with.
  struct Work {
    float *grad, *x;
    int64_t* base;   // by row of grad, words from the planes' start
    float* own;      // sums of a span
    float* kept;     // sums of all spans of the slice,
    double* scores;  // or the scores of its blocks
    bool adds;       // the slice has sums already
  };

  static int64_t whole_lines(int64_t floats) { return round_up(floats, 16); }

  GradRange range(int64_t number) const {
    const int64_t u0 = number / (tiles_p_ * tiles_q_) * plan_.tile_units;
    const int64_t p0 = number / tiles_q_ % tiles_p_ * plan_.tile_p, q0 = number % tiles_q_ * plan_.tile_q;
    return {u0 * plan_.images, std::min(plan_.tile_units, units_ - u0),
            p0, std::min(p0 + plan_.tile_p, s_.P), q0, std::min(q0 + plan_.tile_q, s_.Q)};
  }

  // A tile's planes and gradients.
  void lay_out(const Products& products, const GradRange& tile, const Work& work) const {
    for (int64_t i = 0; i < tile.units * plan_.rows; ++i)
      load_input_row<typename Products::Cell, X>(plan_, call_, tile, i / plan_.rows, i % plan_.rows, work.x);
    for (int64_t i = 0; i < products.loads(tile); ++i)
      products.template load_gradient<X>(call_, tile, i, work.grad, work.base);
  }

  void multiply(const Products& products, const GradRange& tile, const Work& work, int64_t first_span,
                int64_t end_span) const {
    for (int64_t i = first_span; i < end_span; ++i) {
      const BlockGradPlan::Span& span = plan_.spans[i];
      const BlockGradPlan::Block& first = plan_.blocks[span.first];
      float* const kept = work.kept + i * span_floats_;
      float* const sums = sums_blocks_ || work.adds ? work.own : kept;
      products.multiply_span(span,
                             {work.x + first.chunk * plan_.chunk_words() + first.offset, work.base,
                              work.grad + first.row * plan_.row_words(), products.rows(tile), sums, products.pitch});
      if (sums_blocks_) weigh_span(products, span, sums, work.scores);
      else if (work.adds) add(kept, sums);
    }
  }

  void weigh_span(const Products& products, const BlockGradPlan::Span& span, const float* sums, double* scores) const {
    BlockSums of_block{sums, products.stride_k, products.stride_c};
    for (int64_t b = span.first; b < span.first + span.blocks; ++b) {
      scores[b] = weigh_block(*call_.weight, plan_.blocks[b], of_block);
      of_block.sums += plan_.blocks[b].channels * of_block.stride_c;
    }
  }

  void add(float* to, const float* from) const {
    for (int64_t i = 0; i < span_floats_; i += kLanes) store(to + i, load(to + i) + load(from + i));
  }

  void add_scores(const std::vector<double>& scores, int64_t b) const {
    double sum = 0;
    for (int64_t slice = 0; slice < slices_; ++slice) sum += scores[slice * blocks_ + b];
    call_.out[plan_.blocks[b].position] = static_cast<float>(sum);
  }

  // From all slices' sums to what is wanted; called by all threads.
  void finish(const Products& products, float* kept) const {
    std::vector<BlockSums> sums(blocks_);
    for (int64_t i = 0; i < spans_; ++i) {
      BlockSums of_block{kept + i * span_floats_, products.stride_k, products.stride_c};
      for (int64_t b = plan_.spans[i].first; b < plan_.spans[i].first + plan_.spans[i].blocks; ++b) {
        sums[b] = of_block;
        of_block.sums += plan_.blocks[b].channels * of_block.stride_c;
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < spans_; ++i)
      for (int64_t slice = 1; slice < slices_; ++slice)
        add(kept + i * span_floats_, kept + (slice * spans_ + i) * span_floats_);
    // Of single weights all taps of a row and chunk together: they are neighbours in scores and results.
    const int64_t step = singles_ ? taps_ : 1;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks_; b += step) {
      if (!singles_)
        store_block(plan_, plan_.blocks[b], sums[b], call_.out + plan_.blocks[b].position * plan_.bk * plan_.bc);
      for (int64_t k = 0; singles_ && k < plan_.blocks[b].filters; ++k)
        for (int64_t tap = b; tap < b + step; ++tap) weigh_singles(plan_, call_, plan_.blocks[tap], k, sums[tap]);
    }
  }

  const BlockGradPlan& plan_;
  const WeightGradCall& call_;
  const ConvShape& s_;
  int64_t units_, tiles_p_, tiles_q_, tiles_, blocks_, spans_, slices_, most_words_, span_floats_;
  int64_t taps_;  // with blocks, where the layout has all
  bool singles_, sums_blocks_;
};

template <typename Products>
void run_block_grad(const BlockGradPlan& plan, const WeightGradCall& call) {
  if constexpr (std::is_same_v<typename Products::Cell, Bf16>) BlockGradRun<Products, Bf16>(plan, call).run();
  else if (call.dtype == DType::kBF16) BlockGradRun<Products, Bf16>(plan, call).run();
  else if (call.dtype == DType::kF16) BlockGradRun<Products, Fp16>(plan, call).run();
  else BlockGradRun<Products, float>(plan, call).run();
}
