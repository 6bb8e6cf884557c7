// The AVX512-FP16 kernel over AVX2 registers, so that its logic is tested on lesser machines.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "arithmetic.h"
#include "cpu/phases.h"
#include "cpu/scratch.h"
#include "cpu/sparse_conv2d_unstructured.h"

#define VPNS_LANES 16
#define VPNS_HALF_SUMS
#define VPNS_MAX_SEGMENT kMaxSegmentAvx512
#define VPNS_RUN_UNSTRUCTURED run_unstructured_avx512_fp16_emulated

namespace vpns {
namespace {
#include "cpu/simd.inl"
#include "cpu/lanes.inl"
#include "cpu/half_lanes.inl"
#include "cpu/sparse_conv2d_unstructured.inl"
}  // namespace
}  // namespace vpns
