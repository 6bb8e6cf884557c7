// What every binding needs: addresses to pointers, names to enums; and the ops that are bound in files of their own.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

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

void bind_batch_norm_act(pybind11::module_& m);

}  // namespace vpns
