#include "cpu/prompt_conv2d.h"

#include <pybind11/stl.h>

#include "bindings/convert.h"

namespace py = pybind11;

namespace vpns {
namespace {

// The address, type and strides of the images, and everything that makes canvases of them.
PromptedImages images(uintptr_t image, bool is_uint8, const std::vector<int64_t>& strides, const ConvShape& s,
                      int64_t frame, uintptr_t canvas, uintptr_t raw, uintptr_t levels, uintptr_t mean, uintptr_t std,
                      bool rounds) {
  check(strides.size() == 4, "prompt_conv2d", "4 strides", strides.size());
  return {pointer<const void>(image), is_uint8, strides[0], strides[1], strides[2], strides[3], s.H, s.W, frame,
          pointer<const float>(canvas), pointer<const float>(raw), pointer<const float>(levels),
          pointer<const float>(mean), pointer<const float>(std), rounds};
}

}  // namespace

void bind_prompt_conv2d(py::module_& m) {
  py::class_<PromptedImages>(m, "PromptedImages")
      .def(py::init([](const std::vector<int64_t>& sizes, uintptr_t image, bool is_uint8,
                       const std::vector<int64_t>& strides, int64_t frame, uintptr_t canvas, uintptr_t raw,
                       uintptr_t levels, uintptr_t mean, uintptr_t std, bool rounds) {
             return images(image, is_uint8, strides, shape(sizes), frame, canvas, raw, levels, mean, std, rounds);
           }),
           py::arg("shape"), py::arg("image"), py::arg("is_uint8"), py::arg("strides"), py::arg("frame"),
           py::arg("canvas"), py::arg("raw"), py::arg("levels"), py::arg("mean"), py::arg("std"), py::arg("rounds"));

  m.def("prompt_conv2d_kernels", &prompt_conv2d_kernels, py::arg("emulated") = false,
        "Names of the kernels that this machine can run, preferred first.");

  m.def(
      "prompt_conv2d",
      [](const std::vector<int64_t>& sizes, const PromptedImages& source, uintptr_t weight, uintptr_t y,
         const std::string& type, uintptr_t bias, int threads, const std::string& kernel) {
        const ConvCall call{nullptr, DType::kF32, 0, 0, 0, pointer<void>(y), dtype(type), pointer<const void>(bias),
                            threads};
        const PromptForward forward{shape(sizes), pointer<const void>(weight), dtype(type), source, call};
        py::gil_scoped_release release;
        prompt_conv2d(forward, kernel);
      },
      py::arg("shape"), py::arg("images"), py::arg("weight"), py::arg("y"), py::arg("dtype"), py::arg("bias"),
      py::arg("threads"), py::arg("kernel") = "", "The weight is of y's type, the bias in float.");

  m.def(
      "prompt_conv2d_backward",
      [](const std::vector<int64_t>& sizes, const PromptedImages& source, uintptr_t weight, uintptr_t grad,
         const std::string& type, uintptr_t grad_canvas, uintptr_t grad_weight, uintptr_t grad_bias, int threads,
         const std::string& kernel) {
        const PromptBackward backward{shape(sizes),
                                      pointer<const float>(weight),
                                      source,
                                      pointer<const void>(grad),
                                      dtype(type),
                                      pointer<float>(grad_canvas),
                                      pointer<float>(grad_weight),
                                      pointer<float>(grad_bias),
                                      threads};
        py::gil_scoped_release release;
        prompt_conv2d_backward(backward, kernel);
      },
      py::arg("shape"), py::arg("images"), py::arg("weight"), py::arg("grad"), py::arg("dtype"),
      py::arg("grad_canvas"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("threads"), py::arg("kernel") = "",
      "Gradients whose address is 0 are not computed; the weight is in float.");
}

}  // namespace vpns
