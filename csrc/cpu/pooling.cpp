#include "cpu/pooling.h"

#include "checks.h"
#include "cpu/isa.h"

namespace vpns {

void pool(const PoolCall& call) {
#if defined(VPNS_WITH_AVX2)
  if (isa_usable(Isa::kAvx2)) return run_pool_avx2(call);
#endif
  fail("pool", "a CPU with AVX2", "none, or a cap below it");
}

}  // namespace vpns
