// Vectors of 2 · kLanes fp16 numbers: AVX512-FP16's own, else pairs of float vectors that round after every operation.
// Included after lanes.inl.

#ifdef __AVX512FP16__
using HalfVec = _Float16 __attribute__((vector_size(64)));
inline HalfVec load_lanes(const _Float16* from) { return reinterpret_cast<HalfVec>(_mm512_loadu_ph(from)); }
inline HalfVec half_broadcast(float value) {
  return reinterpret_cast<HalfVec>(_mm512_set1_ph(static_cast<_Float16>(value)));
}
inline HalfVec multiply_add(HalfVec a, HalfVec b, HalfVec sum) { return sum + a * b; }
inline Vec part_of(HalfVec v, int part) {
  const __m512i bits = reinterpret_cast<__m512i>(v);
  // Masked by all ones: GCC 12 warns of what the plain ones leave undefined on purpose.
  const __m256i half = part == 0 ? _mm512_castsi512_si256(bits) : _mm512_maskz_extracti64x4_epi64(0xf, bits, 1);
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, half));
}
#else
// Not inlined: the unrolled loops would take minutes to compile.
struct HalfVec {
  Vec parts[2];
};
[[gnu::noinline]] Vec round_to_half(Vec v) {
  Fp16 halves[kLanes];
  store(halves, v);
  return load(halves);
}
[[gnu::noinline]] HalfVec load_lanes(const _Float16* from) {
  const Fp16* halves = reinterpret_cast<const Fp16*>(from);
  return {{load(halves), load(halves + kLanes)}};
}
[[gnu::noinline]] HalfVec half_broadcast(float value) {
  const Vec rounded = round_to_half(broadcast(value));
  return {{rounded, rounded}};
}
[[gnu::noinline]] HalfVec multiply_add(const HalfVec& a, const HalfVec& b, const HalfVec& sum) {
  return {{round_to_half(sum.parts[0] + a.parts[0] * b.parts[0]),
           round_to_half(sum.parts[1] + a.parts[1] * b.parts[1])}};
}
inline Vec part_of(const HalfVec& v, int part) { return v.parts[part]; }
#endif
