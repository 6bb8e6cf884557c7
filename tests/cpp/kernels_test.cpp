// Every sparse convolution kernel of this machine, emulated ones included, against a dense loop in double precision;
// the threshold selection against a sort, and prompt_conv2d with its gradients against loops.
//
// usage: kernels_test [rounds [seed [round]]]. Each round draws a layer and runs all kernels that take it, with one,
// two and three threads, by strips of rows and from two callers at once: the bits must be the same, the inputs lie
// between forbidden pages, and the packed weights are out of reach once prepared. Prints one line per kernel and ends
// with "N passed, 0 failed"; exit code 1 on any difference. Links neither torch nor Python, so that it also runs under
// sanitizers and emulators.
#include <signal.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "conv_cases.h"
#include "cpu/kernels.h"
#include "guarded.h"
#include "prompt_conv2d_check.h"
#include "select_threshold_check.h"

using namespace vpns;

namespace {

// What is being done, for whoever touches a forbidden page.
char current_work[1024] = "nothing";
struct sigaction previous_handler;

void report_fault(int signal) {
  const char* head = signal == SIGSEGV ? "FAILED with a forbidden access: " : "FAILED with a signal: ";
  for (const char* text : {head, static_cast<const char*>(current_work), "\n"})
    if (write(1, text, std::strlen(text)) < 0) break;
  sigaction(SIGSEGV, &previous_handler, nullptr);  // the access is repeated: a sanitizer reports it, else the end
}

// Error of the sums relative to Σ |w| |x|: float32's, except where halves are summed (judged as dense bf16 is).
double sum_error(const Case& c, const std::string& kernel) {
  if (c.x == DType::kF64) return 1e-14;
  return kernel.find("fp16") != std::string::npos ? 1.0 / 512 : 1e-6;
}

// The largest error over its bound; at most 1 is right.
double excess(const Case& c, const Operands& o, const GuardedArray& y, const std::string& kernel) {
  const double half_ulps[] = {0x1p-24, 0x1p-8, 0x1p-53, 0x1p-11};  // by DType
  const double half_ulp = half_ulps[static_cast<int>(c.y)];
  const double least = c.y == DType::kF16 ? 0x1p-25 : 0x1p-120;
  double worst = 0;
  for (int64_t i = 0; i < y.count(); ++i) {
    const double got = y.get(i), expected = o.expected[i];
    if (std::isnan(expected) || std::isinf(expected)) {
      if (std::isnan(expected) ? !std::isnan(got) : got != expected) return 1e9;
      continue;
    }
    if (!std::isfinite(got)) return 1e9;
    const double sums = sum_error(c, kernel) * o.scale[i];
    worst = std::max(worst, std::abs(got - expected) / (sums + half_ulp * (std::abs(expected) + sums) + least));
  }
  return worst;
}

SparseWeights weights_of(const Case& c, const Layer& layer) {
  return {c.format, c.w, layer.values.data(), layer.indptr.as<int32_t>(), layer.index.as<int32_t>(), layer.count, c.bk,
          c.bc, layer.columns};
}

// PROT_READ or PROT_NONE for packed weights.
void allow(const Layer& layer, int protection) {
  for (const Guarded* memory : {&layer.values.memory(), &layer.indptr, &layer.index}) memory->allow(protection);
}

// All there is to say against one kernel on one case; empty where it is right.
std::string complaint(const Case& c, const Layer& layer, const Operands& o, const SparseConvKernel& kernel) {
  const SparseWeights weights = weights_of(c, layer);
  check_sparse_conv2d(c.s, weights);
  const auto prepared = kernel.prepare(c.s, weights);
  allow(layer, PROT_NONE);  // what is prepared no longer needs them
  const auto run = [&](int threads, int64_t height = 0) {  // of strips of rows; 0: all rows at once
    GuardedArray y(c.y, static_cast<int64_t>(o.expected.size()), c.at_back);
    ConvCall call{o.x.data(), c.x,        o.stride_n, o.stride_h, o.stride_w, y.data(),
                  c.y,        c.bias ? o.bias.data() : nullptr, threads};
    call.residual = c.residual ? o.residual.data() : nullptr;
    call.act = c.act;
    if (height == 0) prepared->run(call);
    for (int64_t row = 0; height > 0 && row < c.s.P; row += height) {
      call.first_row = row;
      call.rows = std::min(height, c.s.P - row);
      prepared->run(call);
    }
    return y;
  };
  const GuardedArray first = run(1);
  const double worst = excess(c, o, first, kernel.name);
  if (!(worst <= 1)) return std::to_string(worst) + " times the bound";
  if (!first.memory().surroundings_are_intact()) return "wrote outside its output";
  const auto differs = [&first](const GuardedArray& y) {
    return !y.memory().surroundings_are_intact() || std::memcmp(y.data(), first.data(), first.memory().bytes()) != 0;
  };
  for (const int threads : {2, 3})
    if (differs(run(threads))) return "other bits with " + std::to_string(threads) + " threads";
  if (prepared->takes_any_rows() && differs(run(pick({1, 2}), pick({1, 2, 3, 5}))))
    return "other bits by strips of rows";
  if (one_in(8)) {
    bool other_differs = false;
    std::thread other([&] { other_differs = differs(run(2)); });
    const bool mine_differs = differs(run(1));
    other.join();
    if (mine_differs || other_differs) return "other bits with two callers at once";
  }
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  const unsigned seed = argc > 2 ? std::atoi(argv[2]) : 1;
  const int only = argc > 3 ? std::atoi(argv[3]) : -1;
  struct sigaction action{};
  action.sa_handler = report_fault;
  sigaction(SIGSEGV, &action, &previous_handler);
  std::map<std::string, long> passed;
  long failed = 0;
  for (int round = only < 0 ? 0 : only; round < (only < 0 ? rounds : only + 1); ++round) {
    generator.seed(seed * 1000003 + round);
    if (select_threshold_is_right()) ++passed["select_threshold"];
    else {
      ++failed;
      std::printf("FAILED select_threshold seed %u round %d\n", seed, round);
    }
    const Case c = draw_case();
    const Layer layer = make_layer(c);
    const Operands operands = make_operands(c, layer);
    for (const GuardedArray* input : {&operands.x, &operands.bias, &operands.residual})
      input->memory().allow(PROT_READ);
    for (const SparseConvKernel& kernel : sparse_conv2d_kernels()) {
      allow(layer, PROT_READ);
      if (!isa_usable(kernel.isa)) continue;
      if (!kernel.why_not(c.s, weights_of(c, layer), c.x).empty()) continue;
      std::snprintf(current_work, sizeof current_work, "%s seed %u round %d: %s", kernel.name, seed, round,
                    describe(c).c_str());
      const std::string wrong = complaint(c, layer, operands, kernel);
      if (wrong.empty()) ++passed[kernel.name];
      else {
        ++failed;
        std::printf("FAILED %s: %s\n", current_work, wrong.c_str());
      }
    }
    PromptCheck prompts;
    for (const std::string& kernel : prompt_conv2d_kernels(true))
      for (const DType type : {DType::kBF16, DType::kF32}) {
        if (type == DType::kF32 && kernel.find("bf16") != std::string::npos) continue;
        std::snprintf(current_work, sizeof current_work, "prompt_conv2d %s seed %u round %d", kernel.c_str(), seed,
                      round);
        const std::string wrong = prompts.complaint(kernel, type);
        if (wrong.empty()) ++passed["prompt_conv2d_" + kernel];
        else {
          ++failed;
          std::printf("FAILED %s: %s\n", current_work, wrong.c_str());
        }
      }
  }
  long total = passed["select_threshold"];
  std::printf("select_threshold: %ld\n", total);
  for (const std::string& kernel : prompt_conv2d_kernels(true)) {
    total += passed["prompt_conv2d_" + kernel];
    std::printf("prompt_conv2d_%s: %ld\n", kernel.c_str(), passed["prompt_conv2d_" + kernel]);
  }
  for (const SparseConvKernel& kernel : sparse_conv2d_kernels()) {
    const std::string count = isa_usable(kernel.isa) ? std::to_string(passed[kernel.name]) : "this CPU cannot run it";
    std::printf("%s: %s\n", kernel.name, count.c_str());
    total += passed[kernel.name];
  }
  std::printf("%ld passed, %ld failed\n", total, failed);
  return failed == 0 && total > 0 ? 0 : 1;
}
