// The steps of prompt_conv2d's gradients, for one vector length; after prompt_conv2d.inl and weight_gradient_vectors.inl.

using WordVec = uint32_t __attribute__((vector_size(kLanes * 4)));

// The first `count` numbers; zeros behind them.
template <typename X>
inline Vec load_first(const X* from, int64_t count) {
  if (count >= kLanes) return load(from);
  X some[kLanes] = {};
  std::memcpy(some, from, count * sizeof(X));
  return load(some);
}

// A vector of cells, as multiply_add takes them: numbers in float, or pairs of bf16.
template <typename Cell, typename X>
inline Vec load_cells(const X* from, int64_t count) {
  if constexpr (sizeof(Cell) == 4) {
    return load_first(from, count);
  } else {
    static_assert(std::is_same_v<X, Cell>);
    Vec cells{};
    std::memcpy(&cells, from, std::min<int64_t>(count, 2 * kLanes) * sizeof(X));
    return cells;
  }
}

template <typename X>
void sum_images(const PromptBackward& call, const OutputArea& inner, float* total) {
  const ConvShape& s = call.shape;
  const auto sum = [&](int64_t begin, int64_t end) {
    const X* from = static_cast<const X*>(call.grad);
    copy_cells(from + begin, end - begin, total + begin);
    for (int64_t n = 1; n < s.N; ++n) {
      from += s.P * s.Q * s.K;
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) store(total + i, load(total + i) + load(from + i));
      for (; i < end; ++i) total[i] += widen(from[i]);
    }
  };
#pragma omp parallel for num_threads(call.threads) schedule(dynamic, 1)
  for (int64_t p = 0; p < s.P; ++p) {
    const bool passes = !inner.is_empty() && p >= inner.p0 && p < inner.p1;
    const int64_t row = p * s.Q;
    sum(row * s.K, (row + (passes ? inner.q0 : s.Q)) * s.K);
    if (passes) sum((row + inner.q1) * s.K, (row + s.Q) * s.K);
  }
}

inline Vec8 fold(Vec v) {
  Vec8 parts[kLanes / 8];
  std::memcpy(parts, &v, sizeof v);
  return kLanes == 8 ? parts[0] : parts[0] + parts[kLanes / 8 - 1];
}

// The sum over the lanes of each vector.
template <int kCount>
inline void sum_lanes(const Vec* v, float (&to)[kCount]) {
#pragma GCC unroll 2
  for (int first = 0; first < kCount; first += 8) {
    Vec8 r[8] = {};
#pragma GCC unroll 8
    for (int i = 0; i < std::min(kCount - first, 8); ++i) r[i] = fold(v[first + i]);
    transpose8(r);
    float sums[8];
    store8(sums, ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7])));
    for (int i = 0; i < std::min(kCount - first, 8); ++i) to[first + i] = sums[i];
  }
}

// What three colours of kPixels pixels receive from one image: (h, w) and those one, two, ... strides further, which
// have the same taps.
template <int kPixels, typename Cell, typename X>
inline void pixel_gradients(const FrameGradient& step, const X* grad, int64_t h, int64_t w,
                            float (&found)[kPixels * 3]) {
  constexpr int64_t kCells = 4 / sizeof(Cell) * kLanes;  // of a vector
  const ConvShape& s = step.call.shape;
  const int64_t whole = s.K / kCells * kCells, tap_cells = (s.K + kCells - 1) / kCells * 3 * kCells;
  Vec sum[kPixels * 3] = {};
  const auto add = [&](const X* from, const Cell* weight, int64_t channels) {
    Vec g[kPixels];
#pragma GCC unroll 4
    for (int m = 0; m < kPixels; ++m) g[m] = load_cells<Cell>(from + m * s.K, channels);
#pragma GCC unroll 3
    for (int c = 0; c < 3; ++c) {
      const Vec factor = load_cells<Cell>(weight + c * kCells, kCells);
#pragma GCC unroll 4
      for (int m = 0; m < kPixels; ++m) sum[m * 3 + c] = multiply_add(Cell{}, g[m], factor, sum[m * 3 + c]);
    }
  };
  for (int64_t i = step.rows.first[h]; i < step.rows.first[h + 1]; ++i)
    for (int64_t j = step.columns.first[w]; j < step.columns.first[w + 1]; ++j) {
      const TapsOfAxis::Tap row = step.rows.taps[i], column = step.columns.taps[j];
      const X* from = grad + (row.output * s.Q + column.output) * s.K;
      const Cell* weight = static_cast<const Cell*>(step.weight) + (row.tap * s.S + column.tap) * tap_cells;
      for (int64_t k = 0; k < whole; k += kCells) add(from + k, weight + 3 * k, kCells);
      if (whole < s.K) add(from + whole, weight + 3 * whole, s.K - whole);
    }
  sum_lanes(sum, found);
}

// Adds what kPixels pixels of a row receive from image n, where its colours pass the clamp.
template <int kPixels, typename Cell, typename X>
void add_pixels(const FrameGradient& step, const X* grad, int64_t n, int64_t h, int64_t w, float* row) {
  const PromptedImages& images = step.call.images;
  const ConvShape& s = step.call.shape;
  bool passes[kPixels * 3];
  bool any = false;
  for (int i = 0; i < kPixels * 3; ++i) {
    const int64_t c = i % 3, col = w + i / 3 * s.stride_w;
    passes[i] = true;
    if (images.raw != nullptr) {
      const int64_t at = n * images.stride_n + c * images.stride_c + h * images.stride_h + col * images.stride_w;
      const float value = prompt_pixel(images, at) + images.raw[(h * s.W + col) * 3 + c];
      passes[i] = value >= 0.0f && value <= 1.0f;
    }
    any = any || passes[i];
  }
  if (!any) return;
  float found[kPixels * 3];
  pixel_gradients<kPixels, Cell>(step, grad, h, w, found);
  for (int i = 0; i < kPixels * 3; ++i)
    if (passes[i]) row[(w + i / 3 * s.stride_w) * 3 + i % 3] += found[i];
}

template <typename Cell, typename X>
void frame_gradient(const FrameGradient& step) {
  const PromptBackward& call = step.call;
  const ConvShape& s = call.shape;
  const int64_t frame = call.images.frame;
  constexpr std::array add = {add_pixels<1, Cell, X>, add_pixels<2, Cell, X>, add_pixels<3, Cell, X>, add_pixels<4, Cell, X>};
  static_assert(add.size() == kPixelsAlike);
  const auto add_columns = [&](const X* grad, int64_t n, int64_t h, int64_t begin, int64_t end) {
    float* const row = call.grad_canvas + h * s.W * 3;
    for (int64_t first = begin; first < std::min(begin + s.stride_w, end); ++first)
      for (int64_t w = first; w < end;) {
        const int64_t pixels = std::min(step.columns.alike[w], (end - 1 - w) / s.stride_w + 1);
        add[pixels - 1](step, grad, n, h, w, row);
        w += pixels * s.stride_w;
      }
  };
  // A few rows of the canvas read much the same rows of an image's gradient.
  constexpr int64_t kRows = 4;
#pragma omp parallel for num_threads(call.threads) schedule(dynamic, 1)
  for (int64_t first = 0; first < s.H; first += kRows) {
    const int64_t last = std::min(first + kRows, s.H);
    zero_cells(call.grad_canvas + first * s.W * 3, 3 * s.W * (last - first));
    for (int64_t n = 0; n < step.images; ++n) {
      const X* grad = static_cast<const X*>(step.grad) + n * s.P * s.Q * s.K;
      for (int64_t h = first; h < last; ++h) {
        const bool on_frame = h < frame || h >= s.H - frame;
        add_columns(grad, n, h, 0, on_frame ? s.W : frame);
        if (!on_frame) add_columns(grad, n, h, s.W - frame, s.W);
      }
    }
  }
}

// Rows of the planes as words: a cell, in bf16 together with the same cell of the next output pixel.
template <typename Cell>
void lay_out_words(const WeightGradient& step, const CanvasRows<Cell>& canvases, const GradientTile& tile,
                   int64_t rows, int64_t cols, Cell* cells, uint32_t* to) {
  const ConvShape& s = step.call.shape;
  const int64_t w = tile.area.q0 * s.stride_w - s.pad_w, next = step.w.step * 3;
  for (int64_t row = 0; row < rows; ++row, to += cols * 3) {
    const int64_t h = tile.area.p0 * s.stride_h - s.pad_h + row * step.h.skip;
    compose_row(canvases, std::max<int64_t>(tile.n, 0), h, w, cols, step.w.skip, cells);
    if constexpr (sizeof(Cell) == 4) {
      std::memcpy(to, cells, cols * 3 * sizeof(Cell));
    } else {
      for (int64_t i = 0; i < cols * 3; ++i) {
        const uint32_t second = i + next < cols * 3 ? cells[i + next].bits : 0;
        to[i] = cells[i].bits | second << 16;
      }
    }
  }
}

// kVectors vectors of the gradient from output channel k on, by words of pixels.
template <typename Cell, typename X, int kVectors>
void lay_out_gradient(const ConvShape& s, const X* grad, const OutputArea& area, int64_t k, float* to) {
  constexpr int64_t kPixels = 4 / sizeof(Cell);
  for (int64_t p = area.p0; p < area.p1; ++p)
    for (int64_t q = area.q0; q < area.q1; q += kPixels) {
      const X* from = grad + (p * s.Q + q) * s.K + k;
      for (int v = 0; v < kVectors; ++v, to += kLanes) {
        Vec word = load_first(from + v * kLanes, s.K - k - v * kLanes);
        if constexpr (kPixels == 2) {
          const Vec second = q + 1 < area.q1 ? load_first(from + s.K + v * kLanes, s.K - k - v * kLanes) : Vec{};
          word = (Vec)((WordVec)word >> 16 | (WordVec)second);
        }
        store(to, word);
      }
    }
}

// A tile's share in the sums of kVectors vectors of output channels.
template <typename Cell, typename X, int kVectors>
void add_tile(const WeightGradient& step, const X* grad, const OutputArea& area, int64_t k, const uint32_t* x,
              int64_t cols, const int64_t* base, int64_t words, float* laid_out, float* sums) {
  const ConvShape& s = step.call.shape;
  lay_out_gradient<Cell, X, kVectors>(s, grad, area, k, laid_out);
  // Neighbouring taps of a row are one run of cells.
  const bool is_run = step.w.distance == 1;
  const int64_t runs = is_run ? 1 : s.S, cells = is_run ? 3 * s.S : 3;
  const int64_t shares = (cells + kBlockPixels - 1) / kBlockPixels;
  const float* const first_word = reinterpret_cast<const float*>(x);
  for (int64_t r = 0; r < s.R; ++r)
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t share = 0; share < shares; ++share) {
        const int64_t first = cells * share / shares, count = cells * (share + 1) / shares - first;
        const int64_t at = (r * step.h.distance * cols + run * step.w.distance) * 3 + first;
        float* const to = sums + ((r * s.S + run) * 3 + first) * kVectors * kLanes;
        kOuter<Cell, kVectors>[count - 1]({first_word + at, base, laid_out, words, to, kVectors * kLanes, true});
      }
}

template <typename Cell, typename X>
void add_gradient_tile(const WeightGradient& step, const CanvasRows<Cell>& canvases, const X* grad,
                       const GradientTile& tile, float* memory, float* sums) {
  const ConvShape& s = step.call.shape;
  const OutputArea& area = tile.area;
  const int64_t rows = step.h.extent(area.p1 - area.p0), cols = step.w.extent(area.q1 - area.q0);
  int64_t* const base = reinterpret_cast<int64_t*>(memory);
  float* const laid_out = memory + 2 * step.pixels;
  uint32_t* const x = reinterpret_cast<uint32_t*>(laid_out + step.pixels * 2 * kLanes);
  Cell* const cells = reinterpret_cast<Cell*>(x + step.planes);
  lay_out_words(step, canvases, tile, rows, cols, cells, x);
  int64_t words = 0;
  for (int64_t p = 0; p < area.p1 - area.p0; ++p)
    for (int64_t q = 0; q < area.q1 - area.q0; q += 4 / sizeof(Cell))
      base[words++] = (p * step.h.step * cols + q * step.w.step) * 3;
  const int64_t strip_floats = s.R * s.S * 3 * 2 * kLanes;
  for (int64_t k = 0; k < s.K; k += 2 * kLanes, sums += strip_floats) {
    if (s.K - k > kLanes) add_tile<Cell, X, 2>(step, grad, area, k, x, cols, base, words, laid_out, sums);
    else add_tile<Cell, X, 1>(step, grad, area, k, x, cols, base, words, laid_out, sums);
  }
}

template <typename Cell, typename X>
void weight_gradient(const WeightGradient& step) {
  const PromptBackward& call = step.call;
  const int64_t image = call.shape.P * call.shape.Q * call.shape.K, count = static_cast<int64_t>(step.tiles.size());
  const CanvasRows<Cell> canvases(call.images);
  // The sum over the batch is not rounded to bf16.
  const CanvasRows<float> wide_canvases(call.images);
#pragma omp parallel num_threads(call.threads)
  {
    float* const memory = thread_scratch(step.pixels * (2 + 2 * kLanes) + 2 * step.planes);
#pragma omp for schedule(dynamic, 1)
    for (int64_t chunk = 0; chunk < step.chunks; ++chunk) {
      float* const sums = step.sums + chunk * step.chunk_floats;
      zero_cells(sums, step.chunk_floats);
      for (int64_t i = count * chunk / step.chunks; i < count * (chunk + 1) / step.chunks; ++i) {
        const GradientTile& tile = step.tiles[i];
        if (tile.n < 0) add_gradient_tile(step, wide_canvases, step.total, tile, memory, sums);
        else add_gradient_tile(step, canvases, static_cast<const X*>(call.grad) + tile.n * image, tile, memory, sums);
      }
    }
  }
}

template <typename Cell>
PromptSteps prompt_steps() {
  const auto sum = [](const PromptBackward& call, const OutputArea& inner, float* total) {
    if (call.grad_dtype == DType::kBF16) sum_images<Bf16>(call, inner, total);
    else sum_images<float>(call, inner, total);
  };
  const auto frame = [](const FrameGradient& step) {
    if constexpr (sizeof(Cell) == 2)
      if (step.has_pairs) return frame_gradient<Bf16, Bf16>(step);
    if (!step.call.images.is_framed() && step.call.grad_dtype == DType::kBF16) frame_gradient<float, Bf16>(step);
    else frame_gradient<float, float>(step);
  };
  const auto weight = [](const WeightGradient& step) {
    if constexpr (sizeof(Cell) == 2) weight_gradient<Cell, Bf16>(step);
    else if (step.call.grad_dtype == DType::kBF16) weight_gradient<Cell, Bf16>(step);
    else weight_gradient<Cell, float>(step);
  };
  return {prompt_forward<Cell>, sum, frame, weight};
}
