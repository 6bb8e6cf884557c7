#include <pybind11/stl.h>

#include "bindings/convert.h"
#include "cpu/weight_gradient.h"
#include "cpu/weight_gradient_unstructured.h"

namespace py = pybind11;

namespace vpns {

void bind_gradients(py::module_& m) {
  m.def(
      "sparse_conv2d_prepare_input_gradient",
      [](const std::vector<int64_t>& sizes, const Weights& w, const std::string& grad_type, const std::string& kernel) {
        const ConvShape s = shape(sizes);
        py::gil_scoped_release release;
        check_sparse_conv2d(s, w.raw);
        return prepare_input_gradient(s, w.raw, dtype(grad_type), kernel);
      },
      py::arg("shape"), py::arg("weights"), py::arg("grad_dtype"), py::arg("kernel") = "",
      "Runs on the output's gradient and writes the input's.");

  py::class_<PreparedWeightGrad>(m, "PreparedWeightGrad")
      .def(
          "run",
          [](const PreparedWeightGrad& self, uintptr_t x, const std::string& type, int64_t stride_n, int64_t stride_h,
             int64_t stride_w, uintptr_t grad, uintptr_t out, int threads) {
            const WeightGradCall call{pointer<const void>(x), dtype(type), stride_n, stride_h, stride_w,
                                      pointer<const void>(grad), pointer<float>(out), threads};
            py::gil_scoped_release release;
            self.run(call);
          },
          py::arg("x"), py::arg("dtype"), py::arg("stride_n"), py::arg("stride_h"), py::arg("stride_w"),
          py::arg("grad"), py::arg("out"), py::arg("threads"));

  m.def(
      "sparse_conv2d_prepare_weight_gradient",
      [](const std::vector<int64_t>& sizes, const Weights& w, const std::string& kernel) {
        const ConvShape s = shape(sizes);
        py::gil_scoped_release release;
        check_sparse_conv2d(s, w.raw);
        if (w.raw.format == Format::kUnstructured) return prepare_unstructured_gradient(s, w.raw, kernel);
        return prepare_weight_gradient(s, w.raw, kernel);
      },
      py::arg("shape"), py::arg("weights"), py::arg("kernel") = "",
      "Sums the gradients of kept weights, in their packed order.");

  m.def("unstructured_gradient_kernels", &unstructured_gradient_kernels, py::arg("emulated") = false,
        "Names of the kernels of unstructured weight gradients that this machine can run, preferred first.");
}

}  // namespace vpns
