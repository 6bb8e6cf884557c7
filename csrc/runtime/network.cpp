#include "runtime/network.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

#include "arithmetic.h"
#include "checks.h"
#include "cpu/elementwise.h"
#include "cpu/pooling.h"
#include "runtime/framed.h"

namespace vpns {
namespace {

bool has_weights(const PlanStep& step) { return step.op == PlanOp::kConv2d || step.op == PlanOp::kLinear; }

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void* at(const ImageTensor& tensor, int64_t image) {
  return static_cast<char*>(tensor.data) + image * tensor.stride_n * bytes_of(tensor.dtype);
}

}  // namespace

void ExecutionContext::Free::operator()(char* memory) const { std::free(memory); }

void ExecutionContext::reserve(int64_t threads) {
  if (static_cast<int64_t>(arenas_.size()) < threads) arenas_.resize(threads);
}

char* ExecutionContext::arena(int64_t thread, int64_t bytes) {
  Arena& own = arenas_[thread];
  if (bytes > own.bytes) {
    own.memory.reset();
    own.bytes = 0;
    own.memory.reset(static_cast<char*>(std::aligned_alloc(4096, round_up(bytes, 4096))));
    if (!own.memory) throw std::bad_alloc();
    own.bytes = bytes;
  }
  return own.memory.get();
}

struct Network::Pass {
  char* arena;
  const std::vector<ImageTensor>& x;
  const std::vector<ImageTensor>& y;
  int64_t first, images;
  int threads;
  double* seconds;  // by step; may be null
  const MemoryPlan& memory;
  bool by_strips;  // of one thread: its windows lie behind the images' memory

  // A value of all images; null of none.
  char* at(uint32_t value) const { return value == kNoValue ? nullptr : arena + memory.offsets[value] * images; }
};

struct Network::Work {
  const char *x, *residual;  // residual may be null
  char* y;                   // its first channel
  int64_t images;
  int threads;
  int64_t first_row = 0, rows = -1;  // of the output, -1: all; then x, residual and y are where row 0 would lie
};

Network::Network(const uint8_t* bytes, int64_t size, int64_t segment)
    : plan_(read_plan(bytes, size, segment)), memory_(plan_memory(plan_)) {
  for (const PlanStep& step : plan_.steps) {
    kernels_.push_back(nullptr);
    if (!has_weights(step)) continue;
    const DType x_dtype = plan_.values[step.x].dtype;
    for (const SparseConvKernel& kernel : sparse_conv2d_kernels()) {
      if (step.kernel != kernel.name || !isa_usable(kernel.isa)) continue;
      if (kernel.why_not(step.shape, step.weights, x_dtype).empty()) kernels_.back() = &kernel;
    }
    if (kernels_.back() == nullptr) kernels_.back() = &choose_sparse_conv2d("", step.shape, step.weights, x_dtype);
  }
  for (size_t step = 0; step < plan_.steps.size(); ++step) {
    // Made for one image, as the first call may bring it.
    for_one_.push_back(kernels_[step] == nullptr ? nullptr : &prepared(step, 1, 1));
    if (for_one_.back() != nullptr) takes_any_batch_ = for_one_.back()->takes_any_batch() && takes_any_batch_;
  }
  std::vector<StepSpan> groups;
  for (int64_t step = 0; step < static_cast<int64_t>(plan_.steps.size()); ++step)
    if (plan_.steps[step].strip_steps > 0) groups.push_back({step, plan_.steps[step].strip_steps});
  set_strips(groups);
}

std::vector<std::string> Network::kernels() const {
  std::vector<std::string> names;
  for (const SparseConvKernel* kernel : kernels_) names.emplace_back(kernel == nullptr ? "" : kernel->name);
  return names;
}

void Network::set_chunk(int64_t chunk) {
  check(chunk >= 1, "Network::set_chunk", "at least one image", chunk);
  plan_.chunk = chunk;
}

void Network::set_strips(const std::vector<StepSpan>& groups, int64_t cache_bytes) {
  check_strips(plan_, groups);
  groups_.clear();
  window_bytes_ = 0;
  for (const StepSpan& steps : groups) {
    bool takes_rows = true;
    for (int64_t step = steps.first; step < steps.end(); ++step)
      takes_rows = takes_rows && (for_one_[step] == nullptr || for_one_[step]->takes_any_rows());
    if (!takes_rows) continue;
    groups_.push_back(make_strip_group(plan_, steps, cache_bytes));
    window_bytes_ = std::max(window_bytes_, groups_.back().window_bytes);
  }
  strip_memory_ = plan_memory(plan_, groups_);
}

const PreparedConv& Network::prepared(size_t step, int64_t images, int threads) const {
  const std::lock_guard<std::mutex> guard(lock_);
  for (const int64_t batch : {int64_t{0}, images})
    for (const int workers : {0, threads}) {
      const auto found = prepared_.find({step, batch, workers});
      if (found != prepared_.end()) return *found->second;
    }
  ConvShape shape = plan_.steps[step].shape;
  shape.N = images;
  SparseWeights weights = plan_.steps[step].weights;
  weights.threads = threads;
  std::unique_ptr<PreparedConv> made = kernels_[step]->prepare(shape, weights);
  const int64_t batch = made->takes_any_batch() ? 0 : images;
  return *(prepared_[{step, batch, made->suits_any_threads() ? 0 : threads}] = std::move(made));
}

void Network::run(ExecutionContext& context, const std::vector<ImageTensor>& x, const std::vector<ImageTensor>& y,
                  int64_t images, int threads, double* seconds) const {
  check(images >= 0 && threads >= 1, "Network::run", "at least no image and one thread", images);
  check(x.size() == plan_.inputs.size() && y.size() == plan_.outputs.size(), "Network::run",
        "a tensor for each input and output", x.size());
  context.reserve(threads);
  const size_t steps = plan_.steps.size();
  std::vector<double> clocks(seconds == nullptr ? 0 : threads * steps, 0.0);
  const auto clock_of = [&](int64_t thread) { return seconds == nullptr ? nullptr : clocks.data() + thread * steps; };
  int64_t first = 0;
  while (first < images) {
    const int64_t left = images - first;
    const bool side_by_side = threads > 1 && left >= threads;
    // Equal shares for all threads; what is left over comes next, in smaller ones.
    int64_t chunk = std::min(plan_.chunk, side_by_side ? left / threads : left);
    if (!takes_any_batch_) chunk = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(chunk)));
    const int64_t rounds = left / (chunk * (side_by_side ? threads : 1));
    // Threads that share an image do so step by step.
    const bool by_strips = !groups_.empty() && (side_by_side || threads == 1);
    const MemoryPlan& memory = by_strips ? strip_memory_ : memory_;
    const int64_t arena_bytes = memory.bytes * chunk + (by_strips ? window_bytes_ : 0);
    const auto make_pass = [&](char* arena, int64_t begin, int64_t thread, int workers) {
      return Pass{arena, x, y, begin, chunk, workers, clock_of(thread), memory, by_strips};
    };
    if (!side_by_side) {
      for (int64_t i = 0; i < rounds; ++i, first += chunk)
        run_pass(make_pass(context.arena(0, arena_bytes), first, 0, threads));
      if (threads > 1 && seconds != nullptr)  // all threads were at work
        for (size_t step = 0; step < steps; ++step)
          for (int64_t thread = 1; thread < threads; ++thread) clocks[thread * steps + step] = clocks[step];
      continue;
    }
    std::exception_ptr error;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < rounds * threads; ++i) {
      const int64_t thread = omp_get_thread_num();
      try {
        run_pass(make_pass(context.arena(thread, arena_bytes), first + i * chunk, thread, 1));
      } catch (...) {
#pragma omp critical
        error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    first += rounds * threads * chunk;
  }
  for (size_t i = 0; i < clocks.size(); ++i) seconds[i % steps] += clocks[i] / threads;
}

void Network::run_pass(const Pass& pass) const {
  for (size_t i = 0; i < plan_.inputs.size(); ++i) {
    const PlanValue& in = plan_.values[plan_.inputs[i]];
    const ImageTensor& x = pass.x[i];
    convert_in({at(x, pass.first), pass.at(plan_.inputs[i]), x.dtype, in.dtype, pass.images, in.channels, in.height,
                in.width, x.stride_n, x.stride_c, x.stride_h, x.stride_w, pass.threads});
  }
  auto group = pass.by_strips ? groups_.begin() : groups_.end();
  for (size_t step = 0; step < plan_.steps.size(); ++step) {
    if (group != groups_.end() && step == static_cast<size_t>(group->steps.first)) {
      run_strips(pass, *group);
      step = group->steps.end() - 1;
      ++group;
      continue;
    }
    const double begin = pass.seconds == nullptr ? 0.0 : now();
    const PlanStep& s = plan_.steps[step];
    char* const y = pass.at(s.output) + s.first_channel * bytes_of(plan_.values[s.output].dtype);
    run_step({pass.at(s.x), pass.at(s.residual), y, pass.images, pass.threads}, step);
    if (pass.seconds != nullptr) pass.seconds[step] += now() - begin;
  }
  for (size_t i = 0; i < plan_.outputs.size(); ++i) {
    const PlanValue& out = plan_.values[plan_.outputs[i]];
    const ImageTensor& y = pass.y[i];
    convert_out({pass.at(plan_.outputs[i]), at(y, pass.first), out.dtype, y.dtype, pass.images, out.channels,
                 out.height, out.width, y.stride_n, y.stride_c, y.stride_h, y.stride_w, pass.threads});
  }
}

void Network::run_strips(const Pass& pass, const StripGroup& group) const {
  char* const windows = pass.arena + pass.memory.bytes * pass.images;
  for (int64_t image = 0; image < pass.images; ++image)
    for (const Strip& strip : group.strips) {
      for (const StripMove& move : strip.moves) std::memmove(windows + move.to, windows + move.from, move.bytes);
      for (const StripWork& work : strip.work) {
        const double begin = pass.seconds == nullptr ? 0.0 : now();
        const PlanStep& step = plan_.steps[work.step];
        const auto at = [&](uint32_t value, int64_t place) -> char* {
          if (value == kNoValue) return nullptr;
          return (group.has_window[value] ? windows : pass.at(value) + image * plan_.values[value].bytes()) + place;
        };
        char* const y = at(step.output, work.output) + step.first_channel * bytes_of(plan_.values[step.output].dtype);
        run_step({at(step.x, work.x), at(step.residual, work.residual), y, 1, 1, work.first_row, work.rows}, work.step);
        if (pass.seconds != nullptr) pass.seconds[work.step] += now() - begin;
      }
    }
}

void Network::run_step(const Work& work, size_t index) const {
  const PlanStep& step = plan_.steps[index];
  run_op(work, index);
  if (step.curve == Curve::kNone) return;
  // No kernel takes these in; what the step wrote is in this core's cache still.
  const PlanValue& out = plan_.values[step.output];
  const int64_t channels = has_weights(step) || step.op == PlanOp::kCopy ? step.shape.K : out.channels;
  const int64_t rows = work.rows < 0 ? out.height : work.rows, row_bytes = out.bytes() / out.height;
  apply_curve({step.curve, out.dtype, work.y + work.first_row * row_bytes, work.images * rows * out.width, channels,
               out.channels, work.threads});
}

void Network::run_op(const Work& work, size_t index) const {
  const PlanStep& step = plan_.steps[index];
  const PlanValue &in = plan_.values[step.x], &out = plan_.values[step.output];
  const auto first_of = [&](auto* memory, const PlanValue& value) {  // of the rows that are wanted
    return memory == nullptr ? nullptr : memory + work.first_row * (value.bytes() / value.height);
  };
  // Of what maps pixel to pixel.
  const char *const x = first_of(work.x, in), *const residual = first_of(work.residual, out);
  char* const y = first_of(work.y, out);
  const int64_t image_pixels = (work.rows < 0 ? in.height : work.rows) * in.width, pixels = work.images * image_pixels;
  switch (step.op) {
    case PlanOp::kConv2d:
    case PlanOp::kLinear: {
      ConvCall call{work.x, in.dtype, in.elements(), in.width * in.channels, in.channels, work.y, out.dtype, step.bias,
                    work.threads, work.residual, step.act};
      call.y_stride_n = out.elements();
      call.y_stride_h = out.width * out.channels;
      call.y_stride_w = out.channels;
      if (step.constant != nullptr) return run_framed(step, out, call, *for_one_[index], work.images);
      call.images = work.images;
      call.first_row = work.first_row;
      call.rows = work.rows;
      const bool is_alone = work.images == 1 && work.threads == 1;
      return (is_alone ? *for_one_[index] : prepared(index, work.images, work.threads)).run(call);
    }
    case PlanOp::kMaxPool:
    case PlanOp::kAvgPool:
    case PlanOp::kAdaptiveAvgPool: {
      const Pool kind = step.op == PlanOp::kMaxPool   ? Pool::kMax
                        : step.op == PlanOp::kAvgPool ? Pool::kMean
                                                      : Pool::kAdaptiveMean;
      ConvShape shape = step.shape;
      shape.N = work.images;
      return pool({kind, in.dtype, work.x, work.y, shape, step.counts_padding, work.threads, work.first_row,
                   work.rows});
    }
    case PlanOp::kAdd:
    case PlanOp::kCopy:
      return add_act({in.dtype, x + step.read_channel * bytes_of(in.dtype), residual, y, pixels, step.shape.K,
                      in.channels, out.channels, step.act, work.threads});
    case PlanOp::kGate: {
      const PlanValue& gate = plan_.values[step.residual];
      const bool is_per_image = gate.height * gate.width == 1;
      return apply_gate({in.dtype, x, residual, y, work.images, image_pixels, in.channels, is_per_image, work.threads});
    }
    case PlanOp::kShuffle:
      return shuffle_channels({in.dtype, x, y, pixels, in.channels, step.shape.groups, work.threads});
    case PlanOp::kFlatten:  // channel by channel, as torch does
      return convert_out({x, y, in.dtype, out.dtype, work.images, in.channels, in.height, in.width, in.elements(),
                          in.height * in.width, in.width, 1, work.threads});
    case PlanOp::kTorch:
    case PlanOp::kCount:
      break;
  }
  fail("Network::run", "an op that is known", static_cast<uint32_t>(step.op));
}

}  // namespace vpns
