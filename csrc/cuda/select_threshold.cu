// The magnitude of a float orders like its bits without the sign, 31 of them. Three passes over the scores each settle
// the next bits of the k-th: count how many scores fall into each range, then one block finds the range that holds it.
// Counts are integers, so the result does not depend on the order in which blocks run.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "checks.h"
#include "cuda/select_threshold.h"

namespace vpns {
namespace {

constexpr int kMostTensors = 256;
constexpr int kBins = 1 << 12;
constexpr int kThreads = 512;
constexpr uint32_t kInfinityBits = 0x7f800000u;
// Bits that remain below the range of a pass: 31 = 12 + 12 + 7.
constexpr int kShift[] = {19, 7, 0};
constexpr int kPasses = 3;

// Goes to the kernels by value: no copy to the device, so nothing for the host to wait for.
struct Scores {
  const float* data[kMostTensors];
  int64_t begin[kMostTensors + 1];
  int tensors;
};

struct State {
  unsigned long long histogram[kPasses][kBins];
  unsigned long long rank;  // how many of the present range are kept
  uint32_t prefix;          // the bits settled so far
  int has_nan;
};

__global__ void start(State* state, unsigned long long kept) {
  for (int bin = threadIdx.x; bin < kPasses * kBins; bin += blockDim.x) (&state->histogram[0][0])[bin] = 0;
  if (threadIdx.x == 0) {
    state->rank = kept;
    state->prefix = 0;
    state->has_nan = 0;
  }
}

__global__ void count(Scores scores, State* state, int pass, int shift, int bits) {
  __shared__ unsigned int local[kBins];
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x) local[bin] = 0;
  __syncthreads();
  const uint32_t prefix = state->prefix;
  const uint32_t bin_mask = (1u << bits) - 1u;
  bool nan = false;
  for (int tensor = 0; tensor < scores.tensors; ++tensor) {
    const float* data = scores.data[tensor];
    const int64_t size = scores.begin[tensor + 1] - scores.begin[tensor];
    // Blocks start one after the other over all tensors, so that small tensors do not all fall to the first blocks.
    const int64_t first = scores.begin[tensor] / kThreads % gridDim.x;
    const int64_t block = (static_cast<int64_t>(blockIdx.x) + gridDim.x - first) % gridDim.x;
    for (int64_t i = block * kThreads + threadIdx.x; i < size; i += static_cast<int64_t>(gridDim.x) * kThreads) {
      const uint32_t magnitude = __float_as_uint(data[i]) & 0x7fffffffu;
      nan = nan || magnitude > kInfinityBits;
      if (pass == 0 || magnitude >> (shift + bits) == prefix) atomicAdd(&local[(magnitude >> shift) & bin_mask], 1u);
    }
  }
  if (pass == 0 && nan) state->has_nan = 1;
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += blockDim.x)
    if (local[bin] != 0) atomicAdd(&state->histogram[pass][bin], static_cast<unsigned long long>(local[bin]));
}

// One block: the range from the top that holds the rank-th, by sums of a share of ranges each.
__global__ void narrow(State* state, int pass, int bits, float* threshold, int64_t* ties_kept) {
  __shared__ unsigned long long share[kThreads];
  const int bins = 1 << bits, per_thread = (bins + kThreads - 1) / kThreads;
  const unsigned long long* histogram = state->histogram[pass];
  // Thread 0 holds the highest ranges.
  const int top = bins - 1 - static_cast<int>(threadIdx.x) * per_thread;
  unsigned long long sum = 0;
  for (int bin = top; bin > top - per_thread && bin >= 0; --bin) sum += histogram[bin];
  share[threadIdx.x] = sum;
  __syncthreads();
  for (int step = 1; step < kThreads; step *= 2) {
    const unsigned long long before = threadIdx.x >= step ? share[threadIdx.x - step] : 0;
    __syncthreads();
    share[threadIdx.x] += before;
    __syncthreads();
  }
  const unsigned long long rank = state->rank;
  unsigned long long above = share[threadIdx.x] - sum;
  __syncthreads();
  if (above < rank && rank <= above + sum)
    for (int bin = top; bin > top - per_thread && bin >= 0; --bin) {
      if (rank <= above + histogram[bin]) {
        state->prefix = state->prefix << bits | static_cast<uint32_t>(bin);
        state->rank = rank - above;
        if (pass == kPasses - 1) {
          *threshold = __uint_as_float(state->has_nan ? 0x7fc00000u : state->prefix);
          *ties_kept = state->has_nan ? 0 : static_cast<int64_t>(state->rank);
        }
        break;
      }
      above += histogram[bin];
    }
}

void expect_success(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("select_threshold: expected CUDA to run, got ") + cudaGetErrorString(error));
}

}  // namespace

int64_t select_threshold_cuda_workspace() { return sizeof(State); }

void select_threshold_cuda(const float* const* data, const int64_t* counts, int tensors, int64_t kept, void* workspace,
                           float* threshold, int64_t* ties_kept, void* stream) {
  check(tensors <= kMostTensors, "select_threshold", "at most 256 tensors on the GPU", tensors);
  Scores scores{};
  for (int i = 0; i < tensors; ++i) {
    scores.data[i] = data[i];
    scores.begin[i + 1] = scores.begin[i] + counts[i];
  }
  scores.tensors = tensors;
  const int64_t total = scores.begin[tensors];
  check(kept >= 1 && kept <= total, "select_threshold", "a count of kept scores between 1 and all", kept);
  int device = 0, processors = 0;
  expect_success(cudaGetDevice(&device));
  expect_success(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t wanted = (total + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(wanted < 4 * processors ? wanted : 4 * processors);
  State* state = static_cast<State*>(workspace);
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  start<<<1, kThreads, 0, queue>>>(state, static_cast<unsigned long long>(kept));
  for (int pass = 0; pass < kPasses; ++pass) {
    const int bits = (pass == 0 ? 31 : kShift[pass - 1]) - kShift[pass];
    count<<<blocks, kThreads, 0, queue>>>(scores, state, pass, kShift[pass], bits);
    narrow<<<1, kThreads, 0, queue>>>(state, pass, bits, threshold, ties_kept);
  }
  expect_success(cudaGetLastError());
}

}  // namespace vpns
