// The steps of prompt_conv2d's gradients, for one vector length; after prompt_conv2d.inl and
// weight_gradient_vectors.inl.

using WordVec = uint32_t __attribute__((vector_size(kLanes * 4)));

// The first `count` numbers; zeros behind them.
template <typename X>
inline Vec load_first(const X* from, int64_t count) {
  if (count >= kLanes) return load(from);
  X some[kLanes] = {};
  std::memcpy(some, from, count * sizeof(X));
  return load(some);
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

// to[i] += from[i] for the first `count` of two vectors. The others stay, whatever a NaN made of a weight of zero.
inline void add_first(const float* from, int64_t count, float* to) {
  using IntVec = int32_t __attribute__((vector_size(kLanes * 4)));
  constexpr auto kLane = []<int... I>(std::integer_sequence<int, I...>) { return IntVec{I...}; };
  for (int64_t v = 0; v < count; v += kLanes) {
    const Vec before = load(to + v), after = before + load(from + v);
    const IntVec lane = kLane(std::make_integer_sequence<int, kLanes>{});
    store(to + v, lane < static_cast<int32_t>(count - v) ? after : before);
  }
}

// What a row of the canvas receives from the columns [begin, end) of the outputs. `taps`: by row of taps that reads it,
// where the row of outputs lies; `place` is the first one's among the weights; `sums` has room for two vectors of each
// output.
template <typename Cell>
void add_products(const FrameGradient& step, const Cell* grad, const std::vector<BlockRun>& taps, int64_t place,
                  int64_t begin, int64_t end, float* sums, float* row) {
  constexpr int64_t kFloats = 2 * kLanes;
  const ConvShape& s = step.call.shape;
  const int64_t pitch = step.words * (4 / sizeof(Cell)), skip = 3 * s.stride_w;
  // Outputs whose sums do not meet: to read what has just been written in part takes long.
  const int64_t apart = ceil_div(kFloats, skip);
  int64_t pixel[kBlockPixels];
  for (int64_t run = 0; run < step.runs; ++run)
    for (int64_t part = 0; part < step.parts; ++part) {
      const int64_t first = part * kFloats, count = std::min(kFloats, step.run_floats - first);
      const uint32_t* weights = step.weight + ((run * step.parts + part) * s.R + place) * step.words * kFloats;
      for (int64_t q = begin; q < end; q += kBlockPixels) {
        const int64_t pixels = std::min<int64_t>(kBlockPixels, end - q);
        for (int64_t m = 0; m < pixels; ++m) pixel[m] = (q + m) * pitch;
        kMultiplyRuns<Cell, float, 2>[pixels - 1]({grad, pixel, taps.data(), static_cast<int64_t>(taps.size()), weights,
                                                sums + (q - begin) * kFloats, false, {}});
      }
      float* const to = row + run * s.dilation_w * 3 + first;
      for (int64_t start = begin; start < std::min(begin + apart, end); ++start)
        for (int64_t q = start; q < end; q += apart) add_first(sums + (q - begin) * kFloats, count, to + q * skip);
    }
}

// Adds what columns [begin, end) of a row of the canvas receive from image n, where its colours pass the clamp: chance
// decides that, so nothing branches on it. `values` has room for the row and a vector.
inline void add_passing(const PromptedImages& images, int64_t n, int64_t h, int64_t begin, int64_t end,
                        const float* from, float* values, float* to) {
  const int64_t first = 3 * begin, last = 3 * end;
  if (images.raw == nullptr) {
    for (int64_t i = first; i < last; ++i) to[i] += from[i];
    return;
  }
  const auto read_row = [&](const auto* image) {
    image += n * images.stride_n + h * images.stride_h;
    for (int64_t w = begin; w < end; ++w)
      for (int64_t c = 0; c < 3; ++c)
        values[3 * w + c] = static_cast<float>(image[w * images.stride_w + c * images.stride_c]);
  };
  if (images.is_uint8) read_row(static_cast<const uint8_t*>(images.image));
  else read_row(static_cast<const float*>(images.image));
  const float unit = images.is_uint8 ? 255.0f : 1.0f;
  const float* const raw = images.raw + h * images.W * 3;
  int64_t i = first;
  for (; i + kLanes <= last; i += kLanes) {
    const Vec value = load(values + i) / unit + load(raw + i), before = load(to + i), after = before + load(from + i);
    store(to + i, value >= 0.0f & value <= 1.0f ? after : before);
  }
  for (; i < last; ++i) {
    const float value = values[i] / unit + raw[i];
    to[i] += value >= 0.0f && value <= 1.0f ? from[i] : 0.0f;
  }
}

template <typename Cell, typename X>
void frame_gradient(const FrameGradient& step) {
  const PromptBackward& call = step.call;
  const ConvShape& s = call.shape;
  const int64_t frame = call.images.frame, pitch = step.words * static_cast<int64_t>(4 / sizeof(Cell));
  const bool is_laid_out = std::is_same_v<Cell, X> && pitch == s.K;
  // Outputs that see the frame's left side, and from where on its right one.
  const int64_t left = frame == 0 ? 0 : std::min((frame - 1 + s.pad_w) / s.stride_w + 1, s.Q);
  const int64_t unseen = std::max<int64_t>(s.W - frame + s.pad_w - (s.S - 1) * s.dilation_w, 0);
  const int64_t right = frame == 0 ? s.Q : std::clamp(ceil_div(unseen, s.stride_w), left, s.Q);
  // With the columns of zeros on either side, and room for whole vectors.
  const int64_t row_floats = (s.W + 2 * s.pad_w) * 3 + 2 * kLanes;
  const int64_t sum_floats = s.Q * 2 * kLanes, row_cells = s.Q * pitch;
  const int64_t cell_floats = is_laid_out ? 0 : s.R * row_cells * static_cast<int64_t>(sizeof(Cell)) / 4;
  // A few rows of the canvas read much the same rows of an image's gradient.
  constexpr int64_t kRows = 4;
#pragma omp parallel num_threads(call.threads)
  {
    float* const sums = thread_scratch(sum_floats + 2 * row_floats + cell_floats);
    float *const row = sums + sum_floats, *const values = row + row_floats;
    Cell* const laid_out = reinterpret_cast<Cell*>(values + row_floats);
    std::vector<BlockRun> taps;
    // The rows of outputs that read row h, and where they lie: in the image's gradient itself, where cells are
    // its numbers.
    const auto find_rows = [&](const X* image, int64_t h) -> const Cell* {
      taps.clear();
      for (int64_t i = step.rows.first[h]; i < step.rows.first[h + 1]; ++i) {
        const int64_t p = step.rows.taps[i].output, slot = i - step.rows.first[h];
        taps.push_back({(is_laid_out ? p : slot) * row_cells, step.words});
        for (int64_t q = 0; q < s.Q && !is_laid_out; ++q) {
          Cell* const to = laid_out + slot * row_cells + q * pitch;
          copy_cells(image + (p * s.Q + q) * s.K, s.K, to);
          zero_cells(to + s.K, pitch - s.K);
        }
      }
      if constexpr (std::is_same_v<Cell, X>)
        if (is_laid_out) return image;
      return laid_out;
    };
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < s.H; first += kRows) {
      const int64_t last = std::min(first + kRows, s.H);
      zero_cells(call.grad_canvas + first * s.W * 3, 3 * s.W * (last - first));
      for (int64_t n = 0; n < step.images && frame > 0; ++n)
        for (int64_t h = first; h < last; ++h) {
          const Cell* const grad = find_rows(static_cast<const X*>(step.grad) + n * s.P * s.Q * s.K, h);
          if (taps.empty()) continue;
          const int64_t place = step.places[step.rows.taps[step.rows.first[h]].tap];
          const bool on_frame = h < frame || h >= s.H - frame;
          zero_cells(row, row_floats);
          add_products(step, grad, taps, place, 0, on_frame ? s.Q : left, sums, row);
          if (!on_frame) add_products(step, grad, taps, place, right, s.Q, sums, row);
          float* const to = call.grad_canvas + h * s.W * 3;
          const float* const from = row + s.pad_w * 3;
          add_passing(call.images, n, h, 0, on_frame ? s.W : frame, from, values, to);
          if (!on_frame) add_passing(call.images, n, h, s.W - frame, s.W, from, values, to);
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
  const int64_t shares = ceil_div(cells, kBlockPixels);
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
