// Vectors of VPNS_LANES floats, in GCC's vector extension: the same source compiles to AVX2, to AVX-512, and (for tests) to
// AVX-512's shapes on lesser machines. Included inside the anonymous namespace of each instruction set's own file, so
// that no two copies can be merged by the linker.

constexpr int kLanes = VPNS_LANES;
using Vec = float __attribute__((vector_size(kLanes * 4)));
using Vec8 = float __attribute__((vector_size(32)));
using Int8 = int32_t __attribute__((vector_size(32)));
using Word8 = uint32_t __attribute__((vector_size(32)));
using Half8 = uint16_t __attribute__((vector_size(16)));

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
inline Vec8 load8(const uint16_t* bf16) {
  Half8 half;
  std::memcpy(&half, bf16, sizeof half);
  const Word8 bits = __builtin_convertvector(half, Word8) << 16;
  return __builtin_bit_cast(Vec8, bits);
}
inline void store8(float* to, Vec8 v) { std::memcpy(to, &v, sizeof v); }
inline void store8(uint16_t* to, Vec8 v) {
  const Word8 bits = __builtin_bit_cast(Word8, v);
  const Word8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Word8 quiet_nan = (bits >> 16) | 0x40u;
  const Int8 is_nan = v != v;
  const Half8 half = __builtin_convertvector(is_nan ? quiet_nan : rounded, Half8);
  std::memcpy(to, &half, sizeof half);
}

inline float widen(float value) { return value; }
inline float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void narrow(float* to, float value) { *to = value; }
inline void narrow(uint16_t* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  *to = static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
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
