#include "cpu/batch_norm_act.h"

#include "checks.h"
#include "cpu/isa.h"

namespace vpns {

void batch_norm_act(const BatchNormForward& call) {
#if defined(VPNS_WITH_AVX512)
  if (isa_usable(Isa::kAvx512)) return run_batch_norm_act_avx512(call);
#endif
#if defined(VPNS_WITH_AVX2)
  if (isa_usable(Isa::kAvx2)) return run_batch_norm_act_avx2(call);
#endif
  fail("batch_norm_act", "a CPU with AVX2", "none, or a cap below it");
}

void batch_norm_act_backward(const BatchNormBackward& call) {
#if defined(VPNS_WITH_AVX512)
  if (isa_usable(Isa::kAvx512)) return run_batch_norm_act_backward_avx512(call);
#endif
#if defined(VPNS_WITH_AVX2)
  if (isa_usable(Isa::kAvx2)) return run_batch_norm_act_backward_avx2(call);
#endif
  fail("batch_norm_act", "a CPU with AVX2", "none, or a cap below it");
}

}  // namespace vpns
