// What Python sees of the GPU kernels: device pointers, plain numbers and a stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/select_threshold.h"

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) {
  m.def("select_threshold_workspace", &vpns::select_threshold_cuda_workspace, "Bytes of device memory it works in.");
  m.def(
      "select_threshold",
      [](const std::vector<uintptr_t>& data, const std::vector<int64_t>& counts, int64_t kept, uintptr_t workspace,
         uintptr_t threshold, uintptr_t ties_kept, uintptr_t stream) {
        std::vector<const float*> tensors;
        for (uintptr_t address : data) tensors.push_back(reinterpret_cast<const float*>(address));
        vpns::select_threshold_cuda(tensors.data(), counts.data(), static_cast<int>(tensors.size()), kept,
                                    reinterpret_cast<void*>(workspace), reinterpret_cast<float*>(threshold),
                                    reinterpret_cast<int64_t*>(ties_kept), reinterpret_cast<void*>(stream));
      },
      py::arg("data"), py::arg("counts"), py::arg("kept"), py::arg("workspace"), py::arg("threshold"),
      py::arg("ties_kept"), py::arg("stream"), "Enqueued on the stream; nothing waits.");
}
