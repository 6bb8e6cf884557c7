#include "cpu/batch_norm_act.h"

#include "bindings/convert.h"

namespace py = pybind11;

namespace vpns {

void bind_batch_norm_act(py::module_& m) {
  m.def(
      "batch_norm_act",
      [](const std::string& type, uintptr_t x, uintptr_t residual, uintptr_t y, int64_t pixels, int64_t channels,
         uintptr_t weight, uintptr_t bias, float eps, uintptr_t mean, uintptr_t variance, const std::string& act,
         int threads) {
        const BatchNormForward call{dtype(type),         pointer<const void>(x),      pointer<const void>(residual),
                                    pointer<void>(y),    pixels,                      channels,
                                    pointer<float>(weight), pointer<float>(bias),     eps,
                                    pointer<float>(mean), pointer<float>(variance),   activation(act),
                                    threads};
        py::gil_scoped_release release;
        batch_norm_act(call);
      },
      py::arg("dtype"), py::arg("x"), py::arg("residual"), py::arg("y"), py::arg("pixels"), py::arg("channels"),
      py::arg("weight"), py::arg("bias"), py::arg("eps"), py::arg("mean"), py::arg("variance"), py::arg("act"),
      py::arg("threads"));

  m.def(
      "batch_norm_act_backward",
      [](const std::string& type, uintptr_t grad, uintptr_t x, uintptr_t y, uintptr_t grad_x, uintptr_t grad_residual,
         int64_t pixels, int64_t channels, uintptr_t weight, uintptr_t bias, uintptr_t mean, uintptr_t variance,
         float eps, uintptr_t grad_weight, uintptr_t grad_bias, const std::string& act, int threads) {
        const BatchNormBackward call{dtype(type),
                                     pointer<const void>(grad),
                                     pointer<const void>(x),
                                     pointer<const void>(y),
                                     pointer<void>(grad_x),
                                     pointer<void>(grad_residual),
                                     pixels,
                                     channels,
                                     pointer<float>(weight),
                                     pointer<float>(bias),
                                     pointer<float>(mean),
                                     pointer<float>(variance),
                                     eps,
                                     pointer<float>(grad_weight),
                                     pointer<float>(grad_bias),
                                     activation(act),
                                     threads};
        py::gil_scoped_release release;
        batch_norm_act_backward(call);
      },
      py::arg("dtype"), py::arg("grad"), py::arg("x"), py::arg("y"), py::arg("grad_x"), py::arg("grad_residual"),
      py::arg("pixels"), py::arg("channels"), py::arg("weight"), py::arg("bias"), py::arg("mean"), py::arg("variance"),
      py::arg("eps"), py::arg("grad_weight"), py::arg("grad_bias"), py::arg("act"), py::arg("threads"));
}

}  // namespace vpns
