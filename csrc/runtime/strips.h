// Steps that run together on an image, a strip of rows at a time: what one writes the next reads from the core's own
// second-level cache, not from memory that all cores share.
//
// A strip ends where some more rows of the last step are done; each step before it computes the rows that the steps
// behind it now need and that are not there yet, so nothing is computed twice. A value that only the group's steps
// touch has a window of its rows instead of a place among the activations: before each strip the rows that are still
// needed move to its start.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/plan.h"

namespace vpns {

// Consecutive steps.
struct StepSpan {
  int64_t first, count;

  int64_t end() const { return first + count; }
};

// Whether some rows of its output can be computed from some rows of what it reads.
bool runs_by_rows(const Plan& plan, const PlanStep& step);

// Refuses groups that are not of at least two steps, in order, apart from one another, all of which run by rows.
void check_strips(const Plan& plan, const std::vector<StepSpan>& groups);

// Some rows of a step. Each place is where row 0 of a value would lie: bytes from the start of the windows where the
// value has one, else of its image's place among the activations.
struct StripWork {
  int64_t step, first_row, rows;
  int64_t x, residual, output;
};

// Rows of a window that are needed again, in bytes from the start of the windows.
struct StripMove {
  int64_t from, to, bytes;
};

struct Strip {
  std::vector<StripMove> moves;  // before the work
  std::vector<StripWork> work;
};

struct StripGroup {
  StepSpan steps;
  int64_t rows;  // of the last step's output in a strip; the last strip may have fewer
  std::vector<bool> has_window;  // by value
  int64_t window_bytes;
  std::vector<Strip> strips;
};

// Steps that all run by rows. Strips are as high as lets the rows that a strip touches fit `cache_bytes`.
StripGroup make_strip_group(const Plan& plan, StepSpan steps, int64_t cache_bytes);

}  // namespace vpns
