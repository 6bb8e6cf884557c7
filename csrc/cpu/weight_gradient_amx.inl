// Products of weight_gradient.inl on AMX tiles; included after it, lanes.inl and sparse_conv2d_amx.inl.
//
// A product sums over a line: up to 16 positions along a row of outputs or, where rows are short, over the images, each
// position a word of two images. A tile's 16 rows are output channels of the gradient, which is transposed for it when
// it is laid out: [block row][line][padded bk][position]. The other's rows are the line's words of the input where they
// lie, a constant distance apart: 16 channels (or, in a span of narrow blocks, what follows them).

// 16 or 32 output channels × 16 or 32 words of sums stay in four tile registers while the tile's lines stream past.
template <bool kTwoRows, bool kTwoColumns>
void multiply_lines(const GradTile& tile, int64_t line, int64_t line_floats, int64_t word_stride) {
  _tile_zero(0);
  if (kTwoRows) _tile_zero(1);
  if (kTwoColumns) _tile_zero(2);
  if (kTwoRows && kTwoColumns) _tile_zero(3);
  const float* grad = tile.grad;
  for (int64_t i = 0; i < tile.rows; ++i, grad += line_floats) {
    const float* x = tile.x + tile.base[i];
    _tile_loadd(4, grad, line * 4);
    _tile_loadd(6, x, word_stride * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoRows) {
      _tile_loadd(5, grad + kTileRows * line, line * 4);
      _tile_dpbf16ps(1, 5, 6);
    }
    if (kTwoColumns) {
      _tile_loadd(7, x + 16, word_stride * 4);
      _tile_dpbf16ps(2, 4, 7);
      if (kTwoRows) _tile_dpbf16ps(3, 5, 7);
    }
  }
  const int64_t pitch = tile.pitch;
  _tile_stored(0, tile.sums, pitch * 4);
  if (kTwoRows) _tile_stored(1, tile.sums + kTileRows * pitch, pitch * 4);
  if (kTwoColumns) _tile_stored(2, tile.sums + 16, pitch * 4);
  if (kTwoRows && kTwoColumns) _tile_stored(3, tile.sums + kTileRows * pitch + 16, pitch * 4);
}

// Sums as [padded bk][words].
struct TileProducts {
  using Cell = Bf16;
  const BlockGradPlan& plan;
  const int64_t pitch, stride_k, stride_c = 1;

  TileProducts(const BlockGradPlan& p, int64_t words) : plan(p), pitch(words), stride_k(words) {
    configure_tiles(2 * plan.line);
  }
  TileProducts(const TileProducts&) = delete;
  ~TileProducts() { _tile_release(); }

  int64_t loads(const GradRange& tile) const { return rows(tile); }
  int64_t rows(const GradRange& tile) const { return plan.lines(tile.units, tile.p1 - tile.p0, tile.q1 - tile.q0); }

  // One line, in all block rows.
  template <typename X>
  void load_gradient(const WeightGradCall& call, const GradRange& tile, int64_t number, float* grad,
                     int64_t* base) const {
    const ConvShape& s = plan.shape;
    const int64_t height = tile.p1 - tile.p0, width = tile.q1 - tile.q0, line = plan.line, filters = s.K / s.groups;
    const int64_t extent = plan.over_images ? tile.units : width, others = plan.over_images ? width : tile.units;
    // The last line ends where its axis does; what it shares with the one before is counted there.
    const int64_t wanted = number / (height * others) * line, from = std::min(wanted, extent - line);
    const int64_t p = number / others % height, other = number % others;
    const int64_t unit = plan.over_images ? from : other, q = plan.over_images ? other : from;
    base[number] = ((unit * plan.rows + p * plan.h.step) * plan.cols + q * plan.w.step) * plan.chunk_channels;
    const int64_t image = s.P * s.Q * s.K, step = plan.over_images ? 2 * image : s.K;
    const X* const pixel = static_cast<const X*>(call.grad) + (tile.n0 + unit * 2) * image +
                           ((tile.p0 + p) * s.Q + tile.q0 + q) * s.K;
    for (int64_t row = 0; row < s.groups * plan.rows_per_group; ++row) {
      const int64_t k0 = row % plan.rows_per_group * plan.bk, count = std::min(plan.bk, filters - k0);
      const X* const first = pixel + row / plan.rows_per_group * filters + k0;
      float* to = grad + row * plan.row_words() + number * plan.padded_bk * line;
      for (int64_t k = 0; k < plan.padded_bk; k += kTileRows, to += kTileRows * line) {
        alignas(64) float words[kTileRows][kLanes] = {};
        for (int64_t i = wanted - from; i < line; ++i) {
          const int64_t n = tile.n0 + (unit + (plan.over_images ? i : 0)) * 2;
          const X* const at = first + i * step + k;
          copy_words<Bf16>(at, n + 1 < s.N ? at + image : nullptr, std::clamp<int64_t>(count - k, 0, kTileRows),
                           words[i]);
        }
        Vec square[kLanes];
        for (int i = 0; i < kLanes; ++i) square[i] = load(words[i]);
        transpose(square);
        for (int64_t i = 0; i < kTileRows; ++i) std::memcpy(to + i * line, &square[i], line * 4);
      }
    }
  }

  void multiply_span(const BlockGradPlan::Span& span, GradTile tile) const {
    const float *x = tile.x, *grad = tile.grad;
    float* sums = tile.sums;
    const int64_t line_floats = plan.padded_bk * plan.line;
    const int64_t word_stride = (plan.over_images ? plan.rows * plan.cols : plan.w.step) * plan.chunk_channels;
    for (int64_t k = 0; k < plan.padded_bk; k += 2 * kTileRows)
      for (int64_t c = 0; c < span.words; c += 32) {
        tile.x = x + c;
        tile.grad = grad + k * plan.line;
        tile.sums = sums + k * pitch + c;
        const bool two_rows = plan.padded_bk - k > kTileRows, two_columns = span.words - c > 16;
        const auto multiply = two_rows ? two_columns ? multiply_lines<true, true> : multiply_lines<true, false>
                                       : two_columns ? multiply_lines<false, true> : multiply_lines<false, false>;
        multiply(tile, plan.line, line_floats, word_stride);
      }
  }
};
