// How rows of pixels get into the planes and sums out of them, for sparse_conv2d_block.inl. A cell is a channel of a pixel
// in the planes: float or Bf16.

template <typename Cell, typename X>
inline void copy_cells(const X* from, int64_t count, Cell* to) {
  if constexpr (std::is_same_v<Cell, X>) {
    std::memcpy(to, from, count * sizeof(Cell));
  } else {
    int64_t c = 0;
    for (; c + 8 <= count; c += 8) store8(to + c, load8(from + c));
    for (; c < count; ++c) to[c] = widen(from[c]);
  }
}

template <typename Cell>
inline void zero_cells(Cell* to, int64_t count) {
  std::memset(to, 0, count * sizeof(Cell));
}

// The kept channels of a pixel, side by side; `keeps` has a bit for each of its `channels`.
#if defined(__AVX512BW__)
inline __m512 load_kept(__mmask16 kept, const float* from) { return _mm512_maskz_loadu_ps(kept, from); }
inline __m512 load_kept(__mmask16 kept, const Fp16* from) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(kept, from));
}
inline __m512 load_kept(__mmask16 kept, const Bf16* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(kept, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store_first(__mmask16 first, float* to, __m512 v) { _mm512_mask_storeu_ps(to, first, v); }
inline void store_first(__mmask16 first, Bf16* to, __m512 v) {  // of values that are bf16
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
  _mm256_mask_storeu_epi16(to, first, _mm512_cvtepi32_epi16(high));
}
template <typename Cell, typename X>
void gather_cells(const X* from, const uint16_t* keeps, int64_t channels, Cell* to) {
  for (int64_t c = 0; c < channels; c += 16) {
    const uint16_t kept = keeps[c / 16];
    const int count = __builtin_popcount(kept);
    const __m512 packed = _mm512_maskz_compress_ps(kept, load_kept(kept, from + c));
    store_first(static_cast<__mmask16>((1u << count) - 1), to, packed);
    to += count;
  }
}
#else
template <typename Cell, typename X>
void gather_cells(const X* from, const uint16_t* keeps, int64_t channels, Cell* to) {
  for (int64_t c = 0; c < channels; ++c) {
    if (((keeps[c / 16] >> c % 16) & 1) == 0) continue;
    if constexpr (std::is_same_v<Cell, X>) *to++ = from[c];
    else *to++ = widen(from[c]);
  }
}
#endif

// Lays out rows [begin, end) of the planes of the tile at output (p0, q0) of image n.
template <typename Cell, typename X>
void load_rows(const BlockPlan& plan, const ConvCall& call, int64_t n, int64_t p0, int64_t q0, int64_t begin,
               int64_t end, void* planes) {
  const ConvShape& s = plan.shape;
  const int64_t channels = s.C / s.groups, pixel_cells = s.groups * plan.group_cells, cols = plan.cols;
  const int64_t w0 = q0 * s.stride_w - s.pad_w, skip = plan.w.skip;
  const int64_t left = std::min(cols, w0 < 0 ? (-w0 + skip - 1) / skip : 0);
  const int64_t right = std::clamp(s.W > w0 ? (s.W - w0 + skip - 1) / skip : 0, left, cols);
  const bool gathers = !plan.gather.empty();
  const bool side_by_side = !gathers && pixel_cells == s.C && skip == 1 && call.x_stride_w == s.C;
  for (int64_t row = begin; row < end; ++row) {
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

// y = act(sums + bias + residual) of `count` output channels, from output `at` on.
#if defined(__AVX512BW__)
inline __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1); }
inline void store_lanes(__mmask16 lanes, float* to, __m512 v) { _mm512_mask_storeu_ps(to, lanes, v); }
inline void store_lanes(__mmask16 lanes, Fp16* to, __m512 v) {
  _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_lanes(__mmask16 lanes, Bf16* to, __m512 v) {
#if defined(__AVX512BF16__)
  const __m256i half = (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m256i half =
      _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40)));
#endif
  _mm256_mask_storeu_epi16(to, lanes, half);
}
template <typename Y>
inline void finish16(const Output<Y>& out, int64_t at, __m512 sums, const float* bias, int64_t count) {
  const __mmask16 lanes = first_lanes(count);
  if (bias != nullptr) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(lanes, bias));
  if (out.residual != nullptr) sums = _mm512_add_ps(sums, load_kept(lanes, out.residual + at));
  // The second operand is what a NaN yields: the sum itself.
  if (out.act != Act::kNone) sums = _mm512_max_ps(_mm512_setzero_ps(), sums);
  if (out.act == Act::kRelu6) sums = _mm512_min_ps(_mm512_set1_ps(6.0f), sums);
  store_lanes(lanes, out.y + at, sums);
}
template <typename Y>
void finish_strip(const Output<Y>& out, int64_t at, const float* sums, const float* bias, int64_t count) {
  for (int64_t k = 0; k < count; k += 16)
    finish16(out, at + k, _mm512_loadu_ps(sums + k), bias ? bias + k : nullptr, count - k);
}
template <typename Y>
void scatter_strip(const Output<Y>& out, int64_t at, const float* sums, const float* bias, int64_t span,
                   const uint16_t* keeps) {
  for (int64_t k = 0; k < span; k += 16) {
    const uint16_t kept = keeps[k / 16];
    finish16(out, at + k, _mm512_maskz_expand_ps(kept, _mm512_loadu_ps(sums)), bias ? bias + k : nullptr, span - k);
    sums += __builtin_popcount(kept);
  }
}
#else
template <typename Y>
void finish_strip(const Output<Y>& out, int64_t at, const float* sums, const float* bias, int64_t count) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) finish8(out, at + k, bias ? load8(sums + k) + load8(bias + k) : load8(sums + k));
  for (; k < count; ++k) finish1(out, at + k, bias ? sums[k] + bias[k] : sums[k]);
}
template <typename Y>
void scatter_strip(const Output<Y>& out, int64_t at, const float* sums, const float* bias, int64_t span,
                   const uint16_t* keeps) {
  for (int64_t k = 0; k < span; ++k) {
    const float sum = ((keeps[k / 16] >> k % 16) & 1) != 0 ? *sums++ : 0.0f;
    finish1(out, at + k, bias ? sum + bias[k] : sum);
  }
}
#endif

// The sums [pixels][2 * kLanes] of a strip, each pixel's to the output pixel `target` says.
template <typename Y>
void store_sums(const BlockPlan& plan, const ConvCall& call, const BlockStrip& strip, const float* sums,
                const int64_t* target, int64_t pixels) {
  const Output<Y> out(call);
  const float* bias = call.bias ? static_cast<const float*>(call.bias) + strip.k0 : nullptr;
  for (int64_t m = 0; m < pixels; ++m, sums += 2 * kLanes) {
    const int64_t at = target[m] * plan.shape.K + strip.k0;
    if (strip.span == strip.count) finish_strip(out, at, sums, bias, strip.count);
    else scatter_strip(out, at, sums, bias, strip.span, plan.keeps.data() + strip.first_mask);
  }
}
