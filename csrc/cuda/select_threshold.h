// The exact k-th largest magnitude of a list of float tensors on the GPU, without a sort and without the host waiting.
#pragma once

#include <cstdint>

namespace vpns {

// Bytes of zeroed or unzeroed device memory that a selection works in.
int64_t select_threshold_cuda_workspace();

// Enqueues the selection on `stream` (a cudaStream_t) and returns at once.
//
// data[i] is a device pointer to counts[i] floats, both arrays on the host; `kept` in [1, Σ counts]. Afterwards
// *threshold (device) is the smallest kept magnitude, NaN where a score is NaN, and *ties_kept (device) how many
// entries equal to it are kept. Throws std::invalid_argument for more than 256 tensors and std::runtime_error with
// CUDA's reason.
void select_threshold_cuda(const float* const* data, const int64_t* counts, int tensors, int64_t kept, void* workspace,
                           float* threshold, int64_t* ties_kept, void* stream);

}  // namespace vpns
