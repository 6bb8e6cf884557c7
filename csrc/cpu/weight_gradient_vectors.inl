// Products of weight_gradient.inl for one vector length; included after it and sparse_conv2d_block.inl.

// sums[c][k] = (or +=) Σ over the tile's pixels of x[pixel][c] · grad[pixel][k], kWords × kVectors vectors in
// registers. Rows of grad and of sums are equally long.
template <typename Cell, int kWords, int kVectors>
void add_outer_products(const GradTile& tile) {
  Vec sum[kWords][kVectors] = {};
  if (tile.adds) {
#pragma GCC unroll 16
    for (int c = 0; c < kWords; ++c)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[c][v] = load(tile.sums + c * tile.pitch + v * kLanes);
  }
  const float* grad = tile.grad;
  for (int64_t m = 0; m < tile.rows; ++m, grad += tile.pitch) {
    const float* x = tile.x + tile.base[m];
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
    for (int v = 0; v < kVectors; ++v) store(tile.sums + c * tile.pitch + v * kLanes, sum[c][v]);
}

using AddOuterProducts = void (*)(const GradTile&);
template <typename Cell, int kVectors, int... kWords>
constexpr std::array<AddOuterProducts, sizeof...(kWords)> outer_table(std::integer_sequence<int, kWords...>) {
  return {add_outer_products<Cell, kWords + 1, kVectors>...};
}
template <typename Cell, int kVectors>
constexpr auto kOuter = outer_table<Cell, kVectors>(std::make_integer_sequence<int, kBlockPixels>{});

// The output's gradient as [pixel][padded bk], sums as [words][padded bk].
template <typename CellOfWords>
struct VectorProducts {
  using Cell = CellOfWords;
  const BlockGradPlan& plan;
  const int64_t pitch, stride_k = 1, stride_c;

  VectorProducts(const BlockGradPlan& p, int64_t) : plan(p), pitch(p.padded_bk), stride_c(p.padded_bk) {}
  int64_t loads(const GradRange& tile) const { return tile.units * (tile.p1 - tile.p0); }
  int64_t rows(const GradRange& tile) const { return loads(tile) * (tile.q1 - tile.q0); }

  // One row of output pixels, in all block rows; zeros beyond ragged ones.
  template <typename X>
  void load_gradient(const WeightGradCall& call, const GradRange& tile, int64_t number, float* grad,
                     int64_t* base) const {
    const ConvShape& s = plan.shape;
    const int64_t height = tile.p1 - tile.p0, width = tile.q1 - tile.q0;
    const int64_t unit = number / height, row_p = number % height;
    const int64_t n = tile.n0 + unit * plan.images, p = tile.p0 + row_p, filters = s.K / s.groups;
    for (int64_t row = 0; row < s.groups * plan.rows_per_group; ++row) {
      const int64_t k = row % plan.rows_per_group * plan.bk, count = std::min(plan.bk, filters - k);
      float* to = grad + row * plan.row_words() + number * width * plan.padded_bk;
      const X* first = static_cast<const X*>(call.grad) + ((n * s.P + p) * s.Q + tile.q0) * s.K +
                       row / plan.rows_per_group * filters + k;
      const X* second = plan.images == 2 && n + 1 < s.N ? first + s.P * s.Q * s.K : nullptr;
      for (int64_t q = tile.q0; q < tile.q1; ++q, first += s.K, to += plan.padded_bk) {
        copy_words<Cell>(first, second, count, to);
        if (count < plan.padded_bk) zero_cells(to + count, plan.padded_bk - count);
        if (second != nullptr) second += s.K;
      }
    }
    for (int64_t q = 0; q < width; ++q)
      base[number * width + q] =
          ((unit * plan.rows + row_p * plan.h.step) * plan.cols + q * plan.w.step) * plan.chunk_channels;
  }

  void multiply_span(const BlockGradPlan::Span& span, GradTile tile) const {
    const float *x = tile.x, *grad = tile.grad;
    float* sums = tile.sums;
    const int64_t shares = ceil_div(span.words, kBlockPixels);
    for (int64_t k = 0; k < plan.padded_bk; k += 2 * kLanes) {
      const auto& table = plan.padded_bk - k > kLanes ? kOuter<Cell, 2> : kOuter<Cell, 1>;
      for (int64_t share = 0; share < shares; ++share) {
        const int64_t c = span.words * share / shares;
        tile.x = x + c;
        tile.grad = grad + k;
        tile.sums = sums + c * tile.pitch + k;
        table[span.words * (share + 1) / shares - c - 1](tile);
      }
    }
  }
};
