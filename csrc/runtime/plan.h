// A network as plan.bin holds it (vpns_kernels/engine/plan.py gives the bytes): values, and steps that compute them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "params.h"

namespace vpns {

constexpr uint32_t kNoValue = 0xffffffffu;

// An activation: of each image [height, width, channels].
struct PlanValue {
  int64_t channels, height, width;
  DType dtype;

  int64_t elements() const { return channels * height * width; }
  int64_t bytes() const { return elements() * (dtype == DType::kF32 ? 4 : 2); }
};

enum class PlanOp : uint32_t { kConv2d, kLinear, kMaxPool, kAvgPool, kAdaptiveAvgPool, kAdd, kCopy, kFlatten, kCount };

// One op: output[channels from first_channel on] = act(op(x) + residual).
struct PlanStep {
  std::string name, kernel;
  PlanOp op;
  bool native, counts_padding;
  uint32_t x, residual, output;  // values; residual may be kNoValue
  int64_t first_channel;
  Act act;
  ConvShape shape;        // of one image: N = 1
  SparseWeights weights;  // of convolutions and linear layers; they lie in the plan's bytes
  const float* bias;      // may be null
};

struct Plan {
  std::vector<PlanValue> values;
  std::vector<PlanStep> steps;
  uint32_t input, output;
  int64_t chunk;  // images that a thread takes through the whole network at a time
};

// Reads the bytes of a plan.bin, which must outlive the plan; every number is checked before it is followed.
// std::invalid_argument where they are not what the writer would have written, or hold what only torch can run.
Plan read_plan(const uint8_t* bytes, int64_t size);

}  // namespace vpns
