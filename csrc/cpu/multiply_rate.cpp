#include "cpu/multiply_rate.h"

#include <omp.h>

#include <algorithm>
#include <chrono>

#include "cpu/isa.h"

namespace vpns {
namespace {

// Some milliseconds on any core.
constexpr int64_t kRounds = 1 << 20;
// The fastest counts: others may use the machine meanwhile.
constexpr int kAttempts = 8;

MultiplyLoop strongest([[maybe_unused]] DType dtype) {
  [[maybe_unused]] const bool halves = dtype == DType::kBF16;
#if defined(VPNS_WITH_AMX)
  if (halves && isa_usable(Isa::kAmx)) return run_multiply_loop_amx();
#endif
#if defined(VPNS_WITH_AVX512_BF16)
  if (halves && isa_usable(Isa::kAvx512Bf16)) return run_multiply_loop_avx512_bf16();
#endif
#if defined(VPNS_WITH_AVX512)
  if (!halves && isa_usable(Isa::kAvx512)) return run_multiply_loop_avx512();
#endif
#if defined(VPNS_WITH_AVX2)
  if (!halves && isa_usable(Isa::kAvx2)) return run_multiply_loop_avx2();
#endif
  return {0.0, nullptr};
}

}  // namespace

double multiply_rate(DType dtype, int threads) {
  const MultiplyLoop loop = strongest(dtype);
  if (loop.run == nullptr) return 0.0;
  double best = 0.0;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const auto begin = std::chrono::steady_clock::now();
#pragma omp parallel num_threads(threads)
    loop.run(kRounds);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::max(best, 1e-9 * loop.operations * kRounds * threads / seconds);
  }
  return best;
}

}  // namespace vpns
