// Where activations lie while a network runs: one arena, planned once.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/plan.h"

namespace vpns {

// Offsets in bytes for one image, each a multiple of 64; n images need n times as much, at n times the offset.
struct MemoryPlan {
  std::vector<int64_t> offsets;  // by value; -1 of one that no step uses
  int64_t bytes;
};

// Values that are alive at the same time never share memory; a value lives from its first write to its last read.
MemoryPlan plan_memory(const Plan& plan);

}  // namespace vpns
