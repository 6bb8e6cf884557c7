// The one source of chance of the test program: a round is repeated by its seed.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <random>

inline std::mt19937 generator;

template <typename T>
T pick(std::initializer_list<T> values) {
  std::uniform_int_distribution<size_t> index(0, values.size() - 1);
  return *(values.begin() + index(generator));
}
inline int64_t pick(std::initializer_list<int> values) { return pick<int>(values); }
inline bool one_in(int n) { return std::uniform_int_distribution<int>(1, n)(generator) == 1; }
inline double uniform() { return std::uniform_real_distribution<double>(-1.0, 1.0)(generator); }
