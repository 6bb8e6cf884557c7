#include "cpu/tasks.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace vpns {

TaskQueue::TaskQueue(int64_t whole, int64_t parts, int64_t threads) : threads_(threads) {
  for (const auto& [first, count] : {std::pair{int64_t{0}, whole}, std::pair{whole, parts}})
    for (int64_t i = 0; i < threads; ++i)
      shares_.push_back({first + count * i / threads, first + count * (i + 1) / threads});
}

int64_t TaskQueue::take(int64_t thread) {
  for (int64_t first = 0; first < 2 * threads_; first += threads_)
    for (int64_t i = 0; i < threads_; ++i) {
      Share& share = shares_[first + (thread + i) % threads_];
      int64_t task;
#pragma omp atomic capture
      task = share.next++;
      if (task < share.end) return task;
    }
  return -1;
}

int64_t parts_of_left(int64_t left, int64_t threads, int64_t most) {
  return left == 0 ? 1 : std::min(threads / std::gcd(left, threads), most);
}

}  // namespace vpns
