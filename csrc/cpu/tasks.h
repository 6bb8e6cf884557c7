// Which thread does which task?
//
// Pieces of an activation lie in memory in their order, and a line that another core wrote last takes several times as
// long to fetch as one's own. So each thread begins with its share of them, the same in every layer, and helps others
// only when it is done. What is left over when every thread has had as many whole pieces comes last.
#pragma once

#include <cstdint>
#include <vector>

namespace vpns {

class TaskQueue {
 public:
  // Tasks 0 … whole - 1, then whole … whole + parts - 1.
  TaskQueue(int64_t whole, int64_t parts, int64_t threads);

  // The next task of a thread; -1 where none is left.
  int64_t take(int64_t thread);

 private:
  struct alignas(64) Share {
    int64_t next, end;
  };
  std::vector<Share> shares_;  // of whole tasks by thread, then of parts
  int64_t threads_;
};

// Into how many parts, of `most`, each of the pieces is cut that are left over when every thread has had as many whole
// ones.
int64_t parts_of_left(int64_t left, int64_t threads, int64_t most);

}  // namespace vpns
