// A plan that runs: weights in their kernels' order, and images through all steps without a look back.
//
// Images are independent, so where there are enough of them each thread takes a few (Plan::chunk) through the whole
// network: what one step writes the next finds in the core's own cache, and threads never wait for one another. Images
// that are left over pass with all threads at work on each step.
//
// Groups of steps may take the images of a thread one by one, a strip of rows at a time (strips.h), to the same bits as
// step by step.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "runtime/memory.h"
#include "runtime/plan.h"
#include "runtime/strips.h"

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
  // Groups of steps that run by strips, other than the plan says; not while it runs. A group of which some kernel
  // cannot compute some rows alone runs step by step. `cache_bytes`: that the rows which a strip touches should fit.
  void set_strips(const std::vector<StepSpan>& groups, int64_t cache_bytes = l2_cache_bytes());
  const std::vector<StripGroup>& strips() const { return groups_; }
  int64_t bytes_per_image() const { return memory_.bytes; }

  // y = network(x) for any number of images; any number of threads may call at once, each with its own context.
  // x and y in the order of the plan's inputs and outputs. Where `seconds` is not null, the time of each step is added
  // to it, averaged over the threads.
  void run(ExecutionContext& context, const std::vector<ImageTensor>& x, const std::vector<ImageTensor>& y,
           int64_t images, int threads, double* seconds = nullptr) const;

 private:
  struct Pass;  // some images through all steps
  struct Work;  // some images, or some rows of one, through one

  void run_pass(const Pass& pass) const;
  void run_strips(const Pass& pass, const StripGroup& group) const;
  void run_step(const Work& work, size_t step) const;
  void run_op(const Work& work, size_t step) const;  // without its curve
  const PreparedConv& prepared(size_t step, int64_t images, int threads) const;

  Plan plan_;
  MemoryPlan memory_;
  std::vector<StripGroup> groups_;
  MemoryPlan strip_memory_;   // where the groups run by strips
  int64_t window_bytes_ = 0;  // of the largest group
  std::vector<const SparseConvKernel*> kernels_;  // by step; null where the step has no weights
  bool takes_any_batch_ = true;
  mutable std::mutex lock_;
  // By step, images and threads; 0: any.
  mutable std::map<std::tuple<size_t, int64_t, int>, std::unique_ptr<PreparedConv>> prepared_;
  // By step: what takes one image, by one thread; null where the step has no weights.
  std::vector<const PreparedConv*> for_one_;
};

}  // namespace vpns
