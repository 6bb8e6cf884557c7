#include "runtime/network.h"

#include <omp.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <new>

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

int64_t element_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

void* at(const ImageTensor& tensor, int64_t image) {
  return static_cast<char*>(tensor.data) + image * tensor.stride_n * element_bytes(tensor.dtype);
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
    own.memory.reset(static_cast<char*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
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
    if (kernels_[step] == nullptr) continue;
    // Made for one image, as the first call may bring it.
    takes_any_batch_ = prepared(step, 1).takes_any_batch() && takes_any_batch_;
  }
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

const PreparedConv& Network::prepared(size_t step, int64_t images) const {
  const std::lock_guard<std::mutex> guard(lock_);
  for (const int64_t key : {int64_t{0}, images}) {
    const auto found = prepared_.find({step, key});
    if (found != prepared_.end()) return *found->second;
  }
  ConvShape shape = plan_.steps[step].shape;
  shape.N = images;
  std::unique_ptr<PreparedConv> made = kernels_[step]->prepare(shape, plan_.steps[step].weights);
  const int64_t key = made->takes_any_batch() ? 0 : images;
  return *(prepared_[{step, key}] = std::move(made));
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
    if (!side_by_side) {
      for (int64_t i = 0; i < rounds; ++i, first += chunk)
        run_pass({context.arena(0, memory_.bytes * chunk), x, y, first, chunk, threads, clock_of(0)});
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
        run_pass({context.arena(thread, memory_.bytes * chunk), x, y, first + i * chunk, chunk, 1, clock_of(thread)});
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
    convert_in({at(x, pass.first), pass.arena + memory_.offsets[plan_.inputs[i]] * pass.images, x.dtype, in.dtype,
                pass.images, in.channels, in.height, in.width, x.stride_n, x.stride_c, x.stride_h, x.stride_w,
                pass.threads});
  }
  for (size_t step = 0; step < plan_.steps.size(); ++step) {
    const double begin = pass.seconds == nullptr ? 0.0 : now();
    run_step(pass, step);
    if (pass.seconds != nullptr) pass.seconds[step] += now() - begin;
  }
  for (size_t i = 0; i < plan_.outputs.size(); ++i) {
    const PlanValue& out = plan_.values[plan_.outputs[i]];
    const ImageTensor& y = pass.y[i];
    convert_out({pass.arena + memory_.offsets[plan_.outputs[i]] * pass.images, at(y, pass.first), out.dtype, y.dtype,
                 pass.images, out.channels, out.height, out.width, y.stride_n, y.stride_c, y.stride_h, y.stride_w,
                 pass.threads});
  }
}

void Network::run_step(const Pass& pass, size_t index) const {
  const PlanStep& step = plan_.steps[index];
  run_op(pass, index);
  if (step.curve == Curve::kNone) return;
  // No kernel takes these in; what the step wrote is in this core's cache still.
  const PlanValue& out = plan_.values[step.output];
  const int64_t channels = has_weights(step) || step.op == PlanOp::kCopy ? step.shape.K : out.channels;
  char* const y = pass.arena + memory_.offsets[step.output] * pass.images;
  apply_curve({step.curve, out.dtype, y + step.first_channel * element_bytes(out.dtype),
               pass.images * out.height * out.width, channels, out.channels, pass.threads});
}

void Network::run_op(const Pass& pass, size_t index) const {
  const PlanStep& step = plan_.steps[index];
  const auto memory_of = [&](uint32_t value) -> char* {
    return value == kNoValue ? nullptr : pass.arena + memory_.offsets[value] * pass.images;
  };
  const PlanValue &in = plan_.values[step.x], &out = plan_.values[step.output];
  const char *x = memory_of(step.x), *residual = memory_of(step.residual);
  char* const y = memory_of(step.output) + step.first_channel * element_bytes(out.dtype);
  const int64_t pixels = pass.images * in.height * in.width;
  switch (step.op) {
    case PlanOp::kConv2d:
    case PlanOp::kLinear: {
      ConvCall call{x, in.dtype, in.elements(), in.width * in.channels, in.channels, y, out.dtype, step.bias,
                    pass.threads, residual, step.act};
      call.y_stride_n = out.elements();
      call.y_stride_h = out.width * out.channels;
      call.y_stride_w = out.channels;
      if (step.constant != nullptr) return run_framed(step, out, call, prepared(index, 1), pass.images);
      call.images = pass.images;
      return prepared(index, pass.images).run(call);
    }
    case PlanOp::kMaxPool:
    case PlanOp::kAvgPool:
    case PlanOp::kAdaptiveAvgPool: {
      const Pool kind = step.op == PlanOp::kMaxPool   ? Pool::kMax
                        : step.op == PlanOp::kAvgPool ? Pool::kMean
                                                      : Pool::kAdaptiveMean;
      ConvShape shape = step.shape;
      shape.N = pass.images;
      return pool({kind, in.dtype, x, y, shape, step.counts_padding, pass.threads});
    }
    case PlanOp::kAdd:
    case PlanOp::kCopy:
      return add_act({in.dtype, x + step.read_channel * element_bytes(in.dtype), residual, y, pixels, step.shape.K,
                      in.channels, out.channels, step.act, pass.threads});
    case PlanOp::kGate: {
      const PlanValue& gate = plan_.values[step.residual];
      const bool is_per_image = gate.height * gate.width == 1;
      return apply_gate({in.dtype, x, residual, y, pass.images, in.height * in.width, in.channels, is_per_image,
                         pass.threads});
    }
    case PlanOp::kShuffle:
      return shuffle_channels({in.dtype, x, y, pixels, in.channels, step.shape.groups, pass.threads});
    case PlanOp::kFlatten:  // channel by channel, as torch does
      return convert_out({x, y, in.dtype, out.dtype, pass.images, in.channels, in.height, in.width, in.elements(),
                          in.height * in.width, in.width, 1, pass.threads});
    case PlanOp::kTorch:
    case PlanOp::kCount:
      break;
  }
  fail("Network::run", "an op that is known", static_cast<uint32_t>(step.op));
}

}  // namespace vpns
