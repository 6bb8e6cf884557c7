// How rows of pixels get into the planes and sums out of them, for sparse_conv2d_block.inl; needs
// sparse_conv2d_channels.inl. A cell is a channel of a pixel in the planes: float or Bf16.

template <typename Cell, typename X>
inline void copy_cells(const X* from, int64_t count, Cell* to) {
  if constexpr (std::is_same_v<Cell, X>) {
    std::memcpy(to, from, count * sizeof(Cell));
  } else {
    int64_t c = 0;
    for (; c + 8 <= count; c += 8) store8(to + c, load8(from + c));
    for (; c < count; ++c) narrow(to + c, widen(from[c]));
  }
}

template <typename Cell>
inline void zero_cells(Cell* to, int64_t count) {
  std::memset(to, 0, count * sizeof(Cell));
}

// Lays out the first rows of the planes of the tile at output (p0, q0) of image n.
template <typename Cell, typename X>
void load_rows(const BlockPlan& plan, const ConvCall& call, int64_t n, int64_t p0, int64_t q0, int64_t rows,
               void* planes) {
  const ConvShape& s = plan.shape;
  const int64_t channels = s.C / s.groups, pixel_cells = s.groups * plan.group_cells, cols = plan.cols;
  const int64_t w0 = q0 * s.stride_w - s.pad_w, skip = plan.w.skip;
  const int64_t left = std::min(cols, w0 < 0 ? ceil_div(-w0, skip) : 0);
  const int64_t right = std::clamp(s.W > w0 ? ceil_div(s.W - w0, skip) : 0, left, cols);
  const bool gathers = !plan.gather.empty();
  const bool side_by_side = !gathers && pixel_cells == s.C && skip == 1 && call.x_stride_w == s.C;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t h = p0 * s.stride_h - s.pad_h + row * plan.h.skip;
    Cell* to = static_cast<Cell*>(planes) + row * cols * pixel_cells;
    if (h < 0 || h >= s.H) {
      zero_cells(to, cols * pixel_cells);
      continue;
    }
    zero_cells(to, left * pixel_cells);
    zero_cells(to + right * pixel_cells, (cols - right) * pixel_cells);
    to += left * pixel_cells;
    const X* from = static_cast<const X*>(call.x) + n * call.x_stride_n + h * call.x_stride_h +
                    (w0 + left * skip) * call.x_stride_w;
    if (side_by_side) {
      copy_cells(from, (right - left) * pixel_cells, to);
      continue;
    }
    for (int64_t col = left; col < right; ++col, from += skip * call.x_stride_w)
      for (int64_t g = 0; g < s.groups; ++g, to += plan.group_cells) {
        // A cell that fills up a word is zero; what is there is written over.
        zero_cells(to + plan.group_cells - 1, 1);
        if (gathers) gather_cells(from, plan.gather.data(), channels, to);
        else copy_cells(from + g * channels, channels, to);
      }
  }
}

inline bool streams_outputs(const BlockPlan& plan, const ConvCall& call) {
  const ConvShape& s = plan.shape;
  return call.batch(s) * call.row_count(s) * s.Q * s.K * bytes_of(call.y_dtype) >= kStreamedBytes;
}

// The sums [pixels][lanes of the strip] of a strip, each pixel's to the output pixel `target` says.
template <typename Y>
void store_sums(const BlockPlan& plan, const ConvCall& call, const BlockStrip& strip, const float* sums,
                const int64_t* target, int64_t pixels) {
  const Output<Y> out(call);
  const bool streams = streams_outputs(plan, call);
  const float* bias = call.bias ? static_cast<const float*>(call.bias) + strip.k0 : nullptr;
  const int64_t lanes = (strip.vectors == 0 ? 2 : strip.vectors) * kLanes;
  for (int64_t m = 0; m < pixels; ++m, sums += lanes) {
    const int64_t at = target[m] + strip.k0;
    if (strip.span == strip.count) finish_outputs(out, at, sums, bias, strip.count, streams);
    else scatter_outputs(out, at, sums, bias, strip.span, plan.keeps.data() + strip.first_mask);
  }
}

// Where the sums of a strip of whole vectors go straight from the registers.
struct BlockOutputs {
  const ConvCall* call;
  const int64_t* target;  // as of store_sums; null where the sums are not the last ones
  int64_t k0;
  bool streams;
};

template <typename Y, int kVectors>
inline void finish_vectors(const Output<Y>& out, int64_t at, const Vec (&sums)[kVectors], const float* bias,
                           bool streams) {
#if defined(__AVX512BW__)
  constexpr bool kPairs =
#if defined(__AVX512BF16__)
      std::is_same_v<Y, Bf16>;
#else
      false;
#endif
  const auto vector = [&](int v) __attribute__((always_inline)) {
    return finished(out, at + v * 16, 0xffff, (__m512)sums[v], bias == nullptr ? nullptr : bias + v * 16);
  };
  if (kPairs || !streams) {
    int v = 0;
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
#pragma GCC unroll 2
      for (; v + 1 < kVectors; v += 2) {
        Y* const to = out.y + at + v * 16;
        const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh(vector(v + 1), vector(v));
        if (streams && is_line(to)) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), pair);
        else _mm512_storeu_si512(to, pair);
      }
    }
#endif
#pragma GCC unroll 4
    for (; v < kVectors; ++v) store_lanes(0xffff, out.y + at + v * 16, vector(v));
    return;
  }
#endif
  alignas(64) float lanes[kVectors * kLanes];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store(lanes + v * kLanes, sums[v]);
  finish_outputs(out, at, lanes, bias, kVectors * kLanes, streams);
}
