// The loop of multiply_rate.h over vectors; included by each instruction set's own file. Needs VPNS_MULTIPLY_LOOP (the
// name of the function that is defined).

// As many sums as keep all multipliers at work, however long one multiply-add takes.
constexpr int kRateSums = kLanes == 8 ? 12 : 24;

#if defined(__AVX512BF16__)
constexpr double kRateProducts = 2 * kLanes;
inline Vec multiply_on(Vec sum, Vec factor) {
  const __m512bh pairs = (__m512bh)factor;
  return (Vec)_mm512_dpbf16_ps((__m512)sum, pairs, pairs);
}
#else
constexpr double kRateProducts = kLanes;
inline Vec multiply_on(Vec sum, Vec factor) { return sum * factor + factor; }
#endif

void multiply_rounds(int64_t rounds) {
  Vec factor = broadcast(0.5f), sum[kRateSums] = {};
  // What they are the compiler does not know, nor that the sums are alike.
  asm("" : "+x"(factor));
#pragma GCC unroll 24
  for (int i = 0; i < kRateSums; ++i) asm("" : "+x"(sum[i]));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 24
    for (int i = 0; i < kRateSums; ++i) sum[i] = multiply_on(sum[i], factor);
#pragma GCC unroll 24
  for (int i = 0; i < kRateSums; ++i) asm volatile("" : : "x"(sum[i]));
}

}  // namespace

MultiplyLoop VPNS_MULTIPLY_LOOP() { return {2 * kRateProducts * kRateSums, multiply_rounds}; }

namespace {
