#include "runtime/memory.h"

#include <algorithm>
#include <numeric>

#include "arithmetic.h"

namespace vpns {
namespace {

struct Life {
  int64_t first, last;  // steps
};

std::vector<Life> find_lives(const Plan& plan, const std::vector<StripGroup>& groups) {
  const int64_t steps = static_cast<int64_t>(plan.steps.size());
  std::vector<Life> lives(plan.values.size(), Life{steps, -1});
  const auto use = [&](uint32_t value, int64_t step) {
    if (value == kNoValue) return;
    lives[value].first = std::min(lives[value].first, step);
    lives[value].last = std::max(lives[value].last, step);
  };
  for (uint32_t input : plan.inputs) use(input, -1);
  for (int64_t i = 0; i < steps; ++i) {
    use(plan.steps[i].x, i);
    use(plan.steps[i].residual, i);
    use(plan.steps[i].output, i);
  }
  for (uint32_t output : plan.outputs) use(output, steps);
  for (const StripGroup& group : groups)
    for (size_t value = 0; value < lives.size(); ++value) {
      Life& life = lives[value];
      if (group.has_window[value]) life = {steps, -1};
      if (life.first >= group.steps.first && life.first < group.steps.end()) life.first = group.steps.first;
      if (life.last >= group.steps.first && life.last < group.steps.end()) life.last = group.steps.end() - 1;
    }
  return lives;
}

}  // namespace

MemoryPlan plan_memory(const Plan& plan, const std::vector<StripGroup>& groups) {
  const std::vector<Life> lives = find_lives(plan, groups);
  const auto size = [&](size_t value) { return round_up(plan.values[value].bytes(), 64); };
  std::vector<size_t> order(plan.values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return size(a) > size(b); });
  MemoryPlan memory{std::vector<int64_t>(plan.values.size(), -1), 0};
  std::vector<size_t> placed;
  for (size_t value : order) {
    if (lives[value].last < lives[value].first) continue;  // nobody uses it
    // The lowest place between those that are alive with it.
    std::vector<std::pair<int64_t, int64_t>> taken;
    for (size_t other : placed)
      if (lives[other].first <= lives[value].last && lives[value].first <= lives[other].last)
        taken.emplace_back(memory.offsets[other], memory.offsets[other] + size(other));
    std::sort(taken.begin(), taken.end());
    int64_t at = 0;
    for (const auto& [begin, end] : taken) {
      if (at + size(value) <= begin) break;
      at = std::max(at, end);
    }
    memory.offsets[value] = at;
    memory.bytes = std::max(memory.bytes, at + size(value));
    placed.push_back(value);
  }
  return memory;
}

}  // namespace vpns
