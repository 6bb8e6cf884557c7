#include "cpu/channel_mask.h"

#include "checks.h"
#include "cpu/isa.h"

namespace vpns {

void channel_mask(const ChannelMaskForward& call) {
#if defined(VPNS_WITH_AVX512)
  if (isa_usable(Isa::kAvx512)) return run_channel_mask_avx512(call);
#endif
#if defined(VPNS_WITH_AVX2)
  if (isa_usable(Isa::kAvx2)) return run_channel_mask_avx2(call);
#endif
  fail("channel_mask", "a CPU with AVX2", "none, or a cap below it");
}

void channel_mask_backward(const ChannelMaskBackward& call) {
#if defined(VPNS_WITH_AVX512)
  if (isa_usable(Isa::kAvx512)) return run_channel_mask_backward_avx512(call);
#endif
#if defined(VPNS_WITH_AVX2)
  if (isa_usable(Isa::kAvx2)) return run_channel_mask_backward_avx2(call);
#endif
  fail("channel_mask", "a CPU with AVX2", "none, or a cap below it");
}

}  // namespace vpns
