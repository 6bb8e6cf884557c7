// Division and rounding upwards, of numbers that are not negative.
#pragma once

#include <cstdint>

namespace vpns {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The next multiple of `unit`.
constexpr int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }

}  // namespace vpns
