// What can this CPU run? Asked at run time, and can be forced lower for tests.
#pragma once

#include <string>
#include <vector>

namespace vpns {

enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAvx512Fp16 = 4, kAmx = 5 };

const char* isa_name(Isa isa);

// Whether the CPU, the operating system and the cap allow it.
bool isa_usable(Isa isa);

// Never use anything above `name` ("scalar", "avx2", "avx512", "avx512_bf16", "avx512_fp16", "amx"); empty lifts the
// cap.
// The environment variable VPNS_ISA sets the cap that holds at the start.
void isa_cap(const std::string& name);

// Names of everything usable now, weakest first.
std::vector<std::string> isa_list();

// What designed its cores: vendor and family, of Intel's one family the model too ("amd26", "intel6.143"); empty
// where the CPU does not say. Cores of equal instructions need not be equally fast at them.
std::string cpu_core();

// Bytes of a core's second-level and first-level data cache; a sensible default where the system does not say.
long l2_cache_bytes();
long l1_cache_bytes();

}  // namespace vpns
