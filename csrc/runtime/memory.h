// Where activations lie while a network runs: one arena, planned once.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/plan.h"
#include "runtime/strips.h"

namespace vpns {

// Offsets in bytes for one image, each a multiple of 64; n images need n times as much, at n times the offset.
struct MemoryPlan {
  std::vector<int64_t> offsets;  // by value; -1 of one that no step uses, or that has a window
  int64_t bytes;
};

// Values that are alive at the same time never share memory; a value lives from its first write to its last read. The
// steps of a group are one moment: each of them may still read when any of them writes.
MemoryPlan plan_memory(const Plan& plan, const std::vector<StripGroup>& groups = {});

}  // namespace vpns
