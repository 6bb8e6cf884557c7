// Everything that is compiled for AMX (with AVX-512 for the stores).
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/phases.h"
#include "cpu/scratch.h"
#include "cpu/sparse_conv2d_amx.h"

#define VPNS_LANES 16
#define VPNS_RUN_AMX run_amx

namespace vpns {
namespace {
#include "cpu/simd.inl"
#include "cpu/sparse_conv2d_channels.inl"
#include "cpu/sparse_conv2d_amx.inl"
}  // namespace
}  // namespace vpns
