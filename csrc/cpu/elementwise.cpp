#include "cpu/elementwise.h"

#include "checks.h"
#include "cpu/isa.h"

namespace vpns {

#if defined(VPNS_WITH_AVX2)
#define VPNS_ON_AVX2(call) \
  if (isa_usable(Isa::kAvx2)) return call
#else
#define VPNS_ON_AVX2(call)
#endif

void add_act(const AddCall& call) {
  VPNS_ON_AVX2(run_add_act_avx2(call));
  fail("add_act", "a CPU with AVX2", "none, or a cap below it");
}

void convert_in(const ConvertCall& call) {
  VPNS_ON_AVX2(run_convert_in_avx2(call));
  fail("convert_in", "a CPU with AVX2", "none, or a cap below it");
}

void convert_out(const ConvertCall& call) {
  VPNS_ON_AVX2(run_convert_out_avx2(call));
  fail("convert_out", "a CPU with AVX2", "none, or a cap below it");
}

}  // namespace vpns
