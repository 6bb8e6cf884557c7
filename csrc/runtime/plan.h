// A network as plan.bin holds it (vpns_kernels/engine/plan_file.py has its bytes): values, and steps that compute them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/curves.h"
#include "params.h"

namespace vpns {

constexpr uint32_t kNoValue = 0xffffffffu;

// An activation: of each image [height, width, channels].
struct PlanValue {
  int64_t channels, height, width;
  DType dtype;

  int64_t elements() const { return channels * height * width; }
  int64_t bytes() const { return elements() * bytes_of(dtype); }
};

enum class PlanOp : uint32_t {
  kConv2d, kLinear, kMaxPool, kAvgPool, kAdaptiveAvgPool, kAdd, kCopy, kFlatten, kGate, kShuffle, kTorch, kCount
};

// One op: output[channels from first_channel on] = curve(act(op(x) + residual)). A gate multiplies by its residual.
struct PlanStep {
  std::string name, kernel;
  PlanOp op;
  bool counts_padding;
  uint32_t x, residual, output;  // values; residual may be kNoValue
  int64_t first_channel;         // of the output
  int64_t read_channel;          // of a copy: the first of x
  Act act;
  Curve curve;            // kNone where act is not
  ConvShape shape;        // of one image: N = 1
  SparseWeights weights;  // of convolutions and linear layers; they lie in the plan's bytes
  const float* bias;      // may be null
  // Of a convolution that reads a constant around its images: [P, Q, K] of the output's type, what it gives without
  // them; null otherwise. Then `shape` is that of the outputs that see images, of which the first is
  // [first_p, first_q]; all others are done.
  const void* constant;
  int64_t first_p, first_q;
  int64_t strip_steps;  // how many steps from this one on run together by strips of rows (strips.h); 0: none
};

struct Plan {
  std::vector<PlanValue> values;
  std::vector<PlanStep> steps;
  std::vector<uint32_t> inputs, outputs;  // values; one each of a network without torch
  int64_t chunk;  // images that a thread takes through the whole network at a time
};

constexpr int64_t kWholePlan = -1;

// Reads the bytes of a plan.bin, which must outlive the plan; every number is checked before it is followed.
// std::invalid_argument where they are not what the writer would have written, or hold what only torch can run.
//
// `segment`: of a network that torch runs in part, the steps between two of torch's, counted from 0; what they read of
// others are its inputs, and what others read of them its outputs, both in ascending order.
Plan read_plan(const uint8_t* bytes, int64_t size, int64_t segment = kWholePlan);

}  // namespace vpns
