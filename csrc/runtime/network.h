// A plan that runs: weights in their kernels' order, and images through all steps without a look back.
//
// Images are independent, so where there are enough of them each thread takes a few (Plan::chunk) through the whole
// network: what one step writes the next finds in the core's own cache, and threads never wait for one another. Images
// that are left over pass with all threads at work on each step.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "runtime/memory.h"
#include "runtime/plan.h"

namespace vpns {

// Working memory of one caller at a time; grows at the first call with more threads or images, then stays.
class ExecutionContext {
 public:
  // Memory of a thread, 64-byte aligned.
  char* arena(int64_t thread, int64_t bytes);
  // For `threads` threads.
  void reserve(int64_t threads);

 private:
  struct Free {
    void operator()(char* memory) const;
  };
  struct Arena {
    std::unique_ptr<char, Free> memory;
    int64_t bytes = 0;
  };
  std::vector<Arena> arenas_;
};

// A tensor of images outside the network: strides in elements.
struct ImageTensor {
  void* data;
  DType dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

class Network {
 public:
  // The bytes of a plan.bin, which must outlive the network. A kernel that this CPU cannot run is replaced.
  // `segment`: see read_plan.
  Network(const uint8_t* bytes, int64_t size, int64_t segment = kWholePlan);

  const Plan& plan() const { return plan_; }
  // The kernel that runs each step; empty where the step has no weights.
  std::vector<std::string> kernels() const;
  // Images that a thread takes at a time, other than the plan says; not while it runs.
  void set_chunk(int64_t chunk);
  int64_t bytes_per_image() const { return memory_.bytes; }

  // y = network(x) for any number of images; any number of threads may call at once, each with its own context.
  // x and y in the order of the plan's inputs and outputs. Where `seconds` is not null, the time of each step is added
  // to it, averaged over the threads.
  void run(ExecutionContext& context, const std::vector<ImageTensor>& x, const std::vector<ImageTensor>& y,
           int64_t images, int threads, double* seconds = nullptr) const;

 private:
  struct Pass;  // some images through all steps

  void run_pass(const Pass& pass) const;
  void run_step(const Pass& pass, size_t step) const;
  void run_op(const Pass& pass, size_t step) const;  // without its curve
  const PreparedConv& prepared(size_t step, int64_t images) const;

  Plan plan_;
  MemoryPlan memory_;
  std::vector<const SparseConvKernel*> kernels_;  // by step; null where the step has no weights
  bool takes_any_batch_ = true;
  mutable std::mutex lock_;
  mutable std::map<std::pair<size_t, int64_t>, std::unique_ptr<PreparedConv>> prepared_;  // by step and images, 0: any
};

}  // namespace vpns
