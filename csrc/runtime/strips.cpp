#include "runtime/strips.h"

#include <algorithm>
#include <limits>

#include "arithmetic.h"
#include "checks.h"
#include "cpu/planes.h"

namespace vpns {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
// Of an image: what a strip does is written down once, for all images.
constexpr int64_t kMostStrips = 256;

bool is_window(const PlanStep& step) {
  return step.op == PlanOp::kConv2d || step.op == PlanOp::kMaxPool || step.op == PlanOp::kAvgPool;
}

// Rows [0, this) of what a step reads are what its output rows [0, rows) see.
int64_t rows_read(const PlanStep& step, int64_t rows) {
  const ConvShape& s = step.shape;
  if (rows == 0 || !is_window(step)) return rows;
  return std::clamp<int64_t>((rows - 1) * s.stride_h - s.pad_h + (s.R - 1) * s.dilation_h + 1, 0, s.H);
}

// The first row of what a step reads that its output rows from `row` on see.
int64_t first_read(const PlanStep& step, int64_t row) {
  const ConvShape& s = step.shape;
  return is_window(step) ? std::clamp<int64_t>(row * s.stride_h - s.pad_h, 0, s.H) : row;
}

// Which rows each step computes, strip by strip, and which rows of each value a strip touches.
struct Schedule {
  std::vector<std::vector<int64_t>> done;        // by strip and step: rows after it; first of all, none
  std::vector<std::vector<int64_t>> begin, end;  // by strip and value: rows from the first that it needs
};

class Scheduler {
 public:
  Scheduler(const Plan& plan, StepSpan steps) : plan_(plan), steps_(steps), is_inner_(plan.values.size(), false) {
    for (int64_t i = steps.first; i < steps.end(); ++i) is_inner_[step(i).output] = true;
    for (uint32_t value : plan.inputs) is_inner_[value] = false;
    for (uint32_t value : plan.outputs) is_inner_[value] = false;
    for (int64_t i = 0; i < static_cast<int64_t>(plan.steps.size()); ++i) {
      if (i >= steps.first && i < steps.end()) continue;
      for (uint32_t value : {step(i).x, step(i).residual, step(i).output})
        if (value != kNoValue) is_inner_[value] = false;
    }
  }

  const std::vector<bool>& is_inner() const { return is_inner_; }
  int64_t last_rows() const { return rows_of(step(steps_.end() - 1)); }

  Schedule schedule(int64_t rows) const {
    Schedule made{{std::vector<int64_t>(steps_.count, 0)}, {}, {}};
    for (int64_t end = std::min(rows, last_rows());; end = std::min(end + rows, last_rows())) {
      add_strip(end, made);
      if (end == last_rows()) return made;
    }
  }

  int64_t row_bytes(uint32_t value) const { return plan_.values[value].bytes() / plan_.values[value].height; }

 private:
  const PlanStep& step(int64_t i) const { return plan_.steps[i]; }
  int64_t rows_of(const PlanStep& step) const { return plan_.values[step.output].height; }

  // The strip after which rows [0, last) of the last step are done.
  void add_strip(int64_t last, Schedule& made) const {
    const std::vector<int64_t> before = made.done.back();
    std::vector<int64_t> after = before, begin(plan_.values.size(), kNever), end(plan_.values.size(), 0);
    for (int64_t i = steps_.count - 1; i >= 0; --i) {
      const PlanStep& now = step(steps_.first + i);
      const int64_t rows = rows_of(now);
      int64_t wanted = end[now.output];
      if (i + 1 == steps_.count) wanted = last;
      else if (!is_inner_[now.output]) wanted = std::max(wanted, ceil_div(last * rows, last_rows()));
      after[i] = std::max(before[i], wanted);
      const auto touch = [&](uint32_t value, int64_t from, int64_t to) {
        begin[value] = std::min(begin[value], from);
        end[value] = std::max(end[value], to);
      };
      touch(now.output, before[i], after[i]);
      if (before[i] == rows) continue;  // it reads no more
      touch(now.x, first_read(now, before[i]), rows_read(now, after[i]));
      if (now.residual != kNoValue) touch(now.residual, before[i], after[i]);
    }
    made.done.push_back(after);
    made.begin.push_back(begin);
    made.end.push_back(end);
  }

  const Plan& plan_;
  StepSpan steps_;
  std::vector<bool> is_inner_;
};

// The most rows of a value that a strip touches.
int64_t most_rows(const Schedule& schedule, size_t value) {
  int64_t most = 0;
  for (size_t k = 0; k < schedule.begin.size(); ++k)
    if (schedule.begin[k][value] != kNever) most = std::max(most, schedule.end[k][value] - schedule.begin[k][value]);
  return most;
}

// As high as fits, or of one row; but no more than kMostStrips.
Schedule pick_schedule(const Scheduler& scheduler, size_t values, int64_t cache_bytes) {
  const int64_t all = scheduler.last_rows();
  const auto fits = [&](int64_t rows) {
    const Schedule schedule = scheduler.schedule(rows);
    int64_t bytes = 0;
    for (size_t value = 0; value < values; ++value)
      if (const int64_t most = most_rows(schedule, value); most > 0) bytes += most * scheduler.row_bytes(value);
    return bytes <= cache_bytes;
  };
  int64_t rows = ceil_div(all, kMostStrips), too_many = all + 1;
  while (rows + 1 < too_many) {
    const int64_t middle = (rows + too_many) / 2;
    (fits(middle) ? rows : too_many) = middle;
  }
  return scheduler.schedule(even_tile(all, rows));
}

}  // namespace

bool runs_by_rows(const Plan& plan, const PlanStep& step) {
  switch (step.op) {
    case PlanOp::kConv2d:
      return step.constant == nullptr;
    case PlanOp::kMaxPool:
    case PlanOp::kAvgPool:
    case PlanOp::kAdd:
    case PlanOp::kCopy:
    case PlanOp::kShuffle:
      return true;
    case PlanOp::kGate:
      return plan.values[step.residual].height == plan.values[step.x].height;
    default:
      return false;
  }
}

void check_strips(const Plan& plan, const std::vector<StepSpan>& groups) {
  const char* me = "strips";
  int64_t free = 0;  // steps before are in no group that is still to come
  for (const StepSpan& steps : groups) {
    const int64_t left = static_cast<int64_t>(plan.steps.size()) - steps.first;
    check(steps.first >= free && steps.count >= 2 && steps.count <= left, me, "groups of at least two steps, in order",
          steps.first);
    for (int64_t i = steps.first; i < steps.end(); ++i)
      check(runs_by_rows(plan, plan.steps[i]), me, "steps of which some rows can be computed", plan.steps[i].name);
    free = steps.end();
  }
}

StripGroup make_strip_group(const Plan& plan, StepSpan steps, int64_t cache_bytes) {
  const Scheduler scheduler(plan, steps);
  const Schedule schedule = pick_schedule(scheduler, plan.values.size(), cache_bytes);
  StripGroup group{steps, schedule.done[1].back(), scheduler.is_inner(), 0, {}};
  std::vector<int64_t> window(plan.values.size(), 0);  // where it starts
  for (size_t value = 0; value < window.size(); ++value) {
    if (!group.has_window[value]) continue;
    window[value] = group.window_bytes;
    group.window_bytes += round_up(most_rows(schedule, value) * scheduler.row_bytes(value), 64);
  }
  std::vector<int64_t> first(plan.values.size(), 0), end(plan.values.size(), 0);  // rows in the windows
  for (size_t k = 0; k < schedule.begin.size(); ++k) {
    Strip strip;
    for (uint32_t value = 0; value < window.size(); ++value) {
      if (!group.has_window[value] || schedule.begin[k][value] == kNever) continue;
      const int64_t begin = schedule.begin[k][value], bytes = scheduler.row_bytes(value);
      if (begin > first[value] && begin < end[value])
        strip.moves.push_back({window[value] + (begin - first[value]) * bytes, window[value],
                               (end[value] - begin) * bytes});
      first[value] = begin;
      end[value] = schedule.end[k][value];
    }
    const auto place = [&](uint32_t value) {
      if (value == kNoValue || !group.has_window[value]) return int64_t{0};
      return window[value] - first[value] * scheduler.row_bytes(value);
    };
    for (int64_t i = 0; i < steps.count; ++i) {
      const PlanStep& step = plan.steps[steps.first + i];
      const int64_t from = schedule.done[k][i], rows = schedule.done[k + 1][i] - from;
      if (rows == 0) continue;
      strip.work.push_back({steps.first + i, from, rows, place(step.x), place(step.residual), place(step.output)});
    }
    group.strips.push_back(std::move(strip));
  }
  return group;
}

}  // namespace vpns
