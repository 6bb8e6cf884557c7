// The dispatch table: which kernels are there, what do they take, and how are they run.
//
// A kernel is a row: a name, the instruction set it needs, why_not (empty where it takes the layer), and prepare, which
// turns portable weights into the order the kernel reads (tiles, lanes, tap offsets) and returns something that runs.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "params.h"

namespace vpns {

// A layer's weights in the order its kernel reads them; immutable, so any number of threads may run it at once.
class PreparedConv {
 public:
  virtual ~PreparedConv() = default;
  virtual void run(const ConvCall& call) const = 0;
  // Whether a call may bring another number of images than the shape it was prepared for (ConvCall::images).
  virtual bool takes_any_batch() const { return false; }
  // Whether a call may want some of the output rows alone (ConvCall::first_row), to the same bits.
  virtual bool takes_any_rows() const { return false; }
  // Whether it runs as fast with another number of threads than it was prepared for (SparseWeights::threads).
  virtual bool suits_any_threads() const { return true; }
  // The same layer with other values of the same layout, at less cost than preparing it; null where it has no such way.
  virtual std::unique_ptr<PreparedConv> refilled(const SparseWeights&, int /*threads*/) const { return nullptr; }
};

struct SparseConvKernel {
  const char* name;
  Isa isa;
  // Compiled from the source of a stronger instruction set over plain C++, so that its logic is tested everywhere;
  // never chosen, only named.
  bool emulated;
  // Looks at format, type and sizes of the weights only.
  std::string (*why_not)(const ConvShape&, const SparseWeights&, DType x_dtype);
  std::unique_ptr<PreparedConv> (*prepare)(const ConvShape&, const SparseWeights&);
};

// All kernels, in the order in which they are preferred.
const std::vector<SparseConvKernel>& sparse_conv2d_kernels();

// The kernel of that name, or for an empty name the first that runs here; throws with every reason where none does.
const SparseConvKernel& choose_sparse_conv2d(const std::string& name, const ConvShape&, const SparseWeights&,
                                             DType x_dtype);

// Every kernel that is not emulated, in order of preference, with the reason why it does not take such a layer here
// (empty where it does). Of the weights only format, type and sizes count: values and indices may be null.
std::vector<std::pair<std::string, std::string>> sparse_conv2d_refusals(const ConvShape&, const SparseWeights&,
                                                                        DType x_dtype);

// The input gradient of a layer as something that runs: call.x is dy [N, P, Q, K], call.y is dx [N, H, W, C] dense.
// `weights` are the forward weights; `kernel` as for choose_sparse_conv2d.
std::unique_ptr<PreparedConv> prepare_input_gradient(const ConvShape&, const SparseWeights& weights, DType grad_dtype,
                                                     const std::string& kernel);

// Refuses sizes that do not make a convolution.
void check_conv_shape(const ConvShape&);

// Refuses sizes and indices that would make a kernel read or write outside its tensors.
void check_sparse_conv2d(const ConvShape&, const SparseWeights&);

}  // namespace vpns
