// What the sparse convolution kernels share: reading weights, and how each family adds its rows to the table.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace vpns {

inline float bf16_to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float fp16_to_float(uint16_t half) {
  _Float16 value;
  std::memcpy(&value, &half, sizeof value);
  return static_cast<float>(value);
}

// The i-th stored weight as float (exact for float and both halves).
inline float weight_at(const SparseWeights& weights, int64_t i) {
  if (weights.dtype == DType::kBF16) return bf16_to_float(static_cast<const uint16_t*>(weights.values)[i]);
  if (weights.dtype == DType::kF16) return fp16_to_float(static_cast<const uint16_t*>(weights.values)[i]);
  return static_cast<const float*>(weights.values)[i];
}

// So many values are put in order by several threads.
constexpr int64_t kLeastSharedValues = 16 * 1024;

void add_depthwise_kernels(std::vector<SparseConvKernel>& table);
void add_grouped_kernels(std::vector<SparseConvKernel>& table);
void add_amx_kernels(std::vector<SparseConvKernel>& table);
void add_block_kernels(std::vector<SparseConvKernel>& table);
void add_unstructured_kernels(std::vector<SparseConvKernel>& table);
void add_scalar_kernels(std::vector<SparseConvKernel>& table);

}  // namespace vpns
