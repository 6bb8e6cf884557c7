#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>

#include "checks.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vpns {
namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAvx512Fp16, Isa::kAmx};

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, avx512_fp16 = false, amx = false;
};

#if defined(__x86_64__)
// Linux hands out the 8 KiB of tile state on request only.
bool request_amx_permission() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool bit(unsigned word, int position) { return (word >> position) & 1u; }

Features detect() {
  Features found;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27) || !bit(c, 12) || !bit(c, 29)) return found;  // OSXSAVE, FMA, F16C
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool os_ymm = (low & 0x6u) == 0x6u;
  const bool os_zmm = os_ymm && (low & 0xe0u) == 0xe0u;
  const bool os_tiles = (low & 0x60000u) == 0x60000u;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  found.avx2 = os_ymm && bit(b, 5);
  found.avx512 = found.avx2 && os_zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  found.avx512_fp16 = found.avx512 && bit(d, 23);
  const bool tiles = bit(d, 22) && bit(d, 24);
  unsigned a1 = 0, b1 = 0, c1 = 0, d1 = 0;
  const bool bf16 = __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && bit(a1, 5);
  found.avx512_bf16 = found.avx512 && bf16;
  found.amx = found.avx512_bf16 && tiles && os_tiles && request_amx_permission();
  return found;
}
#else
Features detect() { return {}; }
#endif

const Features& features() {
  static const Features found = detect();
  return found;
}

Isa parse(const std::string& name) {
  for (Isa isa : kAll)
    if (name == isa_name(isa)) return isa;
  fail("isa_cap", "one of scalar, avx2, avx512, avx512_bf16, avx512_fp16, amx", "'" + name + "'");
}

std::atomic<int>& cap() {
  static std::atomic<int> value = [] {
    const char* wanted = std::getenv("VPNS_ISA");
    return static_cast<int>(wanted != nullptr && *wanted != '\0' ? parse(wanted) : Isa::kAmx);
  }();
  return value;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar: return "scalar";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAvx512Fp16: return "avx512_fp16";
    case Isa::kAmx: return "amx";
  }
  return "unknown";
}

bool isa_usable(Isa isa) {
  if (static_cast<int>(isa) > cap().load()) return false;
  switch (isa) {
    case Isa::kScalar: return true;
    case Isa::kAvx2: return features().avx2;
    case Isa::kAvx512: return features().avx512;
    case Isa::kAvx512Bf16: return features().avx512_bf16;
    case Isa::kAvx512Fp16: return features().avx512_fp16;
    case Isa::kAmx: return features().amx;
  }
  return false;
}

void isa_cap(const std::string& name) {
  cap().store(static_cast<int>(name.empty() ? Isa::kAmx : parse(name)));
}

std::vector<std::string> isa_list() {
  std::vector<std::string> names;
  for (Isa isa : kAll)
    if (isa_usable(isa)) names.emplace_back(isa_name(isa));
  return names;
}

std::string cpu_core() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return "";
  constexpr unsigned kAuth = 0x68747541, kGenu = 0x756e6547;  // The first letters of AuthenticAMD and GenuineIntel.
  const unsigned vendor = b;
  if ((vendor != kAuth && vendor != kGenu) || !__get_cpuid(1, &a, &b, &c, &d)) return "";
  const unsigned base = (a >> 8) & 0xfu, family = base == 0xfu ? base + ((a >> 20) & 0xffu) : base;
  if (vendor == kAuth) return "amd" + std::to_string(family);
  const unsigned model = ((a >> 4) & 0xfu) + (((a >> 16) & 0xfu) << 4);
  return "intel" + std::to_string(family) + "." + std::to_string(model);
#else
  return "";
#endif
}

long l2_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 512 * 1024;
}

long l1_cache_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return 32 * 1024;
}

}  // namespace vpns
