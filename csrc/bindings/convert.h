// What every binding needs: addresses to pointers, names to enums; and the ops that are bound in files of their own.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "checks.h"
#include "params.h"

namespace vpns {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float64") return DType::kF64;
  if (name == "float16") return DType::kF16;
  fail("dtype", "float32, bfloat16, float16 or float64", name);
}

inline Act activation(const std::string& name) {
  if (name == "none") return Act::kNone;
  if (name == "relu") return Act::kRelu;
  if (name == "relu6") return Act::kRelu6;
  fail("act", "none, relu or relu6", name);
}

inline ConvShape shape(const std::vector<int64_t>& v) {
  check(v.size() == 16, "ConvShape", "16 sizes", v.size());
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14], v[15]};
}

struct Weights {
  SparseWeights raw;
};

// The sizes of values tell the format: [count], [count, bk, bc] or [count, columns, R, S].
inline Weights weights(uintptr_t values, const std::string& type, uintptr_t indptr, uintptr_t index,
                       const std::vector<int64_t>& sizes, int threads) {
  check(sizes.size() == 1 || sizes.size() == 3 || sizes.size() == 4, "Weights", "values of 1, 3 or 4 dimensions",
        sizes.size());
  const Format format = sizes.size() == 1   ? Format::kUnstructured
                        : sizes.size() == 3 ? Format::kBlock
                                            : Format::kChannel;
  const bool is_block = format == Format::kBlock;
  return {{format, dtype(type), pointer<const void>(values), pointer<const int32_t>(indptr),
           pointer<const int32_t>(index), sizes[0], is_block ? sizes[1] : 1, is_block ? sizes[2] : 1,
           format == Format::kChannel ? sizes[1] : 0, threads}};
}

void bind_machine(pybind11::module_& m);
void bind_select_threshold(pybind11::module_& m);
void bind_batch_norm_act(pybind11::module_& m);
void bind_prompt_conv2d(pybind11::module_& m);
void bind_sparse_conv2d(pybind11::module_& m);
void bind_gradients(pybind11::module_& m);
void bind_masked(pybind11::module_& m);
void bind_network(pybind11::module_& m);

}  // namespace vpns
