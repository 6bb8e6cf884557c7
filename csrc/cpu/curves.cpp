#include "cpu/curves.h"

#include "checks.h"
#include "cpu/isa.h"

namespace vpns {

#if defined(VPNS_WITH_AVX2)
#define VPNS_ON_AVX2(call) \
  if (isa_usable(Isa::kAvx2)) return call
#else
#define VPNS_ON_AVX2(call)
#endif

void apply_curve(const CurveCall& call) {
  VPNS_ON_AVX2(run_curve_avx2(call));
  fail("apply_curve", "a CPU with AVX2", "none, or a cap below it");
}

void apply_gate(const GateCall& call) {
  VPNS_ON_AVX2(run_gate_avx2(call));
  fail("apply_gate", "a CPU with AVX2", "none, or a cap below it");
}

void shuffle_channels(const ShuffleCall& call) {
  VPNS_ON_AVX2(run_shuffle_avx2(call));
  fail("shuffle_channels", "a CPU with AVX2", "none, or a cap below it");
}

}  // namespace vpns
