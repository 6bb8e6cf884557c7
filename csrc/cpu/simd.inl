// Vectors of VPNS_LANES floats, in GCC's vector extension: the same source compiles to AVX2, to AVX-512, and (for
// tests) to AVX-512's shapes on lesser machines. Included inside the anonymous namespace of each instruction set's own
// file, so that no two copies can be merged by the linker.

constexpr int kLanes = VPNS_LANES;
using Vec = float __attribute__((vector_size(kLanes * 4)));
using Vec8 = float __attribute__((vector_size(32)));
using Int8 = int32_t __attribute__((vector_size(32)));
using Word8 = uint32_t __attribute__((vector_size(32)));
using Half8 = uint16_t __attribute__((vector_size(16)));
static_assert(sizeof(Bf16) == 2 && sizeof(Fp16) == 2);

// A vector anywhere in an array of floats.
using LooseVec = Vec __attribute__((aligned(4), may_alias));
inline Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store(float* to, Vec v) { *reinterpret_cast<LooseVec*>(to) = v; }
inline Vec broadcast(float value) { return value - Vec{}; }

inline Vec8 load8(const float* from) {
  Vec8 v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline Vec8 load8(const Fp16* from) {
  return reinterpret_cast<Vec8>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Vec8 load8(const Bf16* bf16) {
  Half8 half;
  std::memcpy(&half, bf16, sizeof half);
  const Word8 bits = __builtin_convertvector(half, Word8) << 16;
  return __builtin_bit_cast(Vec8, bits);
}
inline void store8(float* to, Vec8 v) { std::memcpy(to, &v, sizeof v); }
inline void store8(Fp16* to, Vec8 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store8(Bf16* to, Vec8 v) {
  const Word8 bits = __builtin_bit_cast(Word8, v);
  const Word8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Word8 quiet_nan = (bits >> 16) | 0x40u;
  const Int8 is_nan = v != v;
  const Half8 half = __builtin_convertvector(is_nan ? quiet_nan : rounded, Half8);
  std::memcpy(to, &half, sizeof half);
}

inline float widen(float value) { return value; }
inline float widen(Fp16 half) { return _cvtsh_ss(half.bits); }
inline float widen(Bf16 half) {
  const uint32_t bits = static_cast<uint32_t>(half.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void narrow(float* to, float value) { *to = value; }
inline void narrow(Fp16* to, float value) { to->bits = static_cast<uint16_t>(_cvtss_sh(value, 0)); }
inline void narrow(Bf16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits =
      static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// A vector of numbers of 16 bits, widened; and one rounded to them.
#if VPNS_LANES == 16 && defined(__AVX512BW__)
inline Vec load(const Fp16* from) {
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Vec load(const Bf16* from) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (Vec)_mm512_maskz_slli_epi32(0xffff, wide, 16);
}
inline __m256i round_to_16(Fp16, __m512 v) {
  return _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline __m256i round_to_16(Bf16, __m512 v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40)));
#endif
}
template <typename Y>
inline void store(Y* to, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round_to_16(Y{}, (__m512)v));
}
#else
struct Eights {
  Vec8 of[kLanes / 8];
};
template <typename X>
inline Vec load(const X* from) {
  Eights eights;
  for (int i = 0; i < kLanes / 8; ++i) eights.of[i] = load8(from + 8 * i);
  return __builtin_bit_cast(Vec, eights);
}
template <typename Y>
inline void store(Y* to, Vec v) {
  const Eights eights = __builtin_bit_cast(Eights, v);
  for (int i = 0; i < kLanes / 8; ++i) store8(to + 8 * i, eights.of[i]);
}
#endif

// Where sums go: y = act(sums + residual), rounded once. A NaN stays a NaN, as in torch.
template <typename Y>
struct Output {
  Y* y;
  const Y* residual;  // by the same index as y; may be null
  Act act;

  explicit Output(const ConvCall& call)
      : y(static_cast<Y*>(call.y)), residual(static_cast<const Y*>(call.residual)), act(call.act) {}
};
template <typename V>  // a vector or one number
inline V activate(V v, Act act) {
  if (act == Act::kNone) return v;
  v = v < 0.0f ? V{} : v;
  return act == Act::kRelu6 ? (v > 6.0f ? V{} + 6.0f : v) : v;
}
template <typename Y>
void finish8(const Output<Y>& out, int64_t at, Vec8 sums) {
  if (out.residual != nullptr) sums += load8(out.residual + at);
  store8(out.y + at, activate(sums, out.act));
}
template <typename Y>
void finish1(const Output<Y>& out, int64_t at, float sum) {
  if (out.residual != nullptr) sum += widen(out.residual[at]);
  narrow(out.y + at, activate(sum, out.act));
}
template <typename Y>
void finish_row(const Output<Y>& out, int64_t at, const float* sums, int64_t count) {
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) finish8(out, at + k, load8(sums + k));
  for (; k < count; ++k) finish1(out, at + k, sums[k]);
}

// Calls body(X{}, Y{}) with the element types of a call that is not in double precision.
template <typename Body>
void with_types(const ConvCall& call, const Body& body) {
  const auto with_x = [&](auto x) {
    if (call.y_dtype == DType::kBF16) body(x, Bf16{});
    else if (call.y_dtype == DType::kF16) body(x, Fp16{});
    else body(x, float{});
  };
  if (call.x_dtype == DType::kBF16) with_x(Bf16{});
  else if (call.x_dtype == DType::kF16) with_x(Fp16{});
  else with_x(float{});
}

inline void transpose8(Vec8 r[8]) {
  Vec8 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = __builtin_shufflevector(a[i], a[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    b[i + 2] = __builtin_shufflevector(a[i + 1], a[i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    b[i + 3] = __builtin_shufflevector(a[i + 1], a[i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
