// The channels of one pixel: kept inputs gathered, sums finished and scattered among pruned outputs (sixteen at a time
// with masks where the CPU has them). Lists of kept channels have a bit for each channel (sparse_conv2d_channels.h).

// Outputs of at least this many bytes would not stay in the caches until somebody reads them.
constexpr int64_t kStreamedBytes = 16 << 20;

// The kept ones of a pixel's `channels`, side by side.
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

// y = act(sums + bias + residual) of `count` output channels, from output `at` on.
#if defined(__AVX512BW__)
inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1);
}
inline void store_lanes(__mmask16 lanes, float* to, __m512 v) { _mm512_mask_storeu_ps(to, lanes, v); }
inline void store_lanes(__mmask16 lanes, Fp16* to, __m512 v) {
  _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_lanes(__mmask16 lanes, Bf16* to, __m512 v) {
  _mm256_mask_storeu_epi16(to, lanes, round_to_16(Bf16{}, v));
}
// The outputs themselves, not yet rounded.
template <typename Y>
inline __m512 finished(const Output<Y>& out, int64_t at, __mmask16 lanes, __m512 sums, const float* bias) {
  if (bias != nullptr) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(lanes, bias));
  if (out.residual != nullptr) sums = _mm512_add_ps(sums, load_kept(lanes, out.residual + at));
  // The second operand is what a NaN yields: the sum itself.
  if (out.act != Act::kNone) sums = _mm512_max_ps(_mm512_setzero_ps(), sums);
  if (out.act == Act::kRelu6) sums = _mm512_min_ps(_mm512_set1_ps(6.0f), sums);
  return sums;
}
inline bool is_line(const void* to) { return reinterpret_cast<uintptr_t>(to) % 64 == 0; }
// Whole cache lines past the caches, which would first read what is written over; gives how many outputs it wrote.
inline int64_t stream_outputs(const Output<float>& out, int64_t at, const float* sums, const float* bias,
                              int64_t count) {
  int64_t k = 0;
  for (; is_line(out.y + at) && k + 16 <= count; k += 16)
    _mm512_stream_ps(out.y + at + k,
                     finished(out, at + k, 0xffff, _mm512_loadu_ps(sums + k), bias ? bias + k : nullptr));
  return k;
}
#if defined(__AVX512BF16__)
inline int64_t stream_outputs(const Output<Bf16>& out, int64_t at, const float* sums, const float* bias,
                              int64_t count) {
  int64_t k = 0;
  for (; is_line(out.y + at) && k + 32 <= count; k += 32) {
    const __m512 low = finished(out, at + k, 0xffff, _mm512_loadu_ps(sums + k), bias ? bias + k : nullptr);
    const __m512 high =
        finished(out, at + k + 16, 0xffff, _mm512_loadu_ps(sums + k + 16), bias ? bias + k + 16 : nullptr);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out.y + at + k), (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  return k;
}
#endif
template <typename Y>
inline int64_t stream_outputs(const Output<Y>&, int64_t, const float*, const float*, int64_t) {
  return 0;
}
template <typename Y>
void finish_outputs(const Output<Y>& out, int64_t at, const float* sums, const float* bias, int64_t count,
                    bool streams) {
  for (int64_t k = streams ? stream_outputs(out, at, sums, bias, count) : 0; k < count; k += 16) {
    const __mmask16 lanes = first_lanes(count - k);
    store_lanes(lanes, out.y + at + k,
                finished(out, at + k, lanes, _mm512_maskz_loadu_ps(lanes, sums + k), bias ? bias + k : nullptr));
  }
}
template <typename Y>
void scatter_outputs(const Output<Y>& out, int64_t at, const float* sums, const float* bias, int64_t span,
                     const uint16_t* keeps) {
  for (int64_t k = 0; k < span; k += 16) {
    const uint16_t kept = keeps[k / 16];
    const int count = __builtin_popcount(kept);
    const __mmask16 lanes = first_lanes(span - k);
    const __m512 spread = _mm512_maskz_expand_ps(kept, _mm512_maskz_loadu_ps(first_lanes(count), sums));
    store_lanes(lanes, out.y + at + k, finished(out, at + k, lanes, spread, bias ? bias + k : nullptr));
    sums += count;
  }
}
inline void end_streams() { _mm_sfence(); }
#else
template <typename Y>
void finish_outputs(const Output<Y>& out, int64_t at, const float* sums, const float* bias, int64_t count, bool) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) finish8(out, at + k, bias ? load8(sums + k) + load8(bias + k) : load8(sums + k));
  for (; k < count; ++k) finish1(out, at + k, bias ? sums[k] + bias[k] : sums[k]);
}
template <typename Y>
void scatter_outputs(const Output<Y>& out, int64_t at, const float* sums, const float* bias, int64_t span,
                     const uint16_t* keeps) {
  for (int64_t k = 0; k < span; ++k) {
    const float sum = ((keeps[k / 16] >> k % 16) & 1) != 0 ? *sums++ : 0.0f;
    finish1(out, at + k, bias ? sum + bias[k] : sum);
  }
}
inline void end_streams() {}
#endif
