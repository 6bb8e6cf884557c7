// What Python sees of the sparse convolutions: weights, the dispatch table, and layers that are prepared and run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/convert.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace vpns {
namespace {

void bind_layers(py::module_& m) {
  py::class_<Weights>(m, "Weights").def(py::init(&weights), py::arg("values"), py::arg("dtype"), py::arg("indptr"),
                                        py::arg("index"), py::arg("sizes"), py::arg("threads") = 1);

  py::class_<PreparedConv>(m, "PreparedConv")
      .def(
          "refilled",
          [](const PreparedConv& self, const Weights& w, int threads) {
            py::gil_scoped_release release;
            return self.refilled(w.raw, threads);
          },
          py::arg("weights"), py::arg("threads"),
          "The same for other values of the same layout; None where only preparing them helps.")
      .def(
          "run",
          [](const PreparedConv& self, uintptr_t x, const std::string& x_type, int64_t stride_n, int64_t stride_h,
             int64_t stride_w, uintptr_t y, const std::string& y_type, uintptr_t bias, uintptr_t residual,
             const std::string& act, int threads, uintptr_t phases) {
            const ConvCall call{pointer<const void>(x),        dtype(x_type), stride_n,
                                stride_h,                      stride_w,      pointer<void>(y),
                                dtype(y_type),                 pointer<const void>(bias), threads,
                                pointer<const void>(residual), activation(act),
                                pointer<double>(phases)};
            py::gil_scoped_release release;
            self.run(call);
          },
          py::arg("x"), py::arg("x_dtype"), py::arg("stride_n"), py::arg("stride_h"), py::arg("stride_w"), py::arg("y"),
          py::arg("y_dtype"), py::arg("bias"), py::arg("residual"), py::arg("act"), py::arg("threads"),
          py::arg("phases") = 0,
          "One call; `phases` is 0 or the address of three doubles to which seconds are added: "
          "layout, products, stores.");
}

void bind_table(py::module_& m) {
  m.def(
      "sparse_conv2d_kernels",
      [](bool emulated) {
        std::vector<std::string> names;
        for (const SparseConvKernel& kernel : sparse_conv2d_kernels())
          if (isa_usable(kernel.isa) && (emulated || !kernel.emulated)) names.emplace_back(kernel.name);
        return names;
      },
      py::arg("emulated") = false, "Names of the kernels that this machine can run, preferred first.");

  m.def(
      "sparse_conv2d_refusals",
      [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& values_sizes, const std::string& values_type,
         const std::string& x_type) {
        return sparse_conv2d_refusals(shape(sizes), weights(0, values_type, 0, 0, values_sizes, 1).raw, dtype(x_type));
      },
      py::arg("shape"), py::arg("values_sizes"), py::arg("values_dtype"), py::arg("x_dtype"),
      "(name, why not) of every kernel, preferred first; why not is empty where it takes layers of these sizes here.");

  m.def(
      "sparse_conv2d_choose",
      [](const std::vector<int64_t>& sizes, const Weights& w, const std::string& x_type, const std::string& kernel) {
        return std::string(choose_sparse_conv2d(kernel, shape(sizes), w.raw, dtype(x_type)).name);
      },
      py::arg("shape"), py::arg("weights"), py::arg("x_dtype"), py::arg("kernel") = "");

  m.def(
      "sparse_conv2d_prepare",
      [](const std::vector<int64_t>& sizes, const Weights& w, const std::string& x_type, const std::string& kernel) {
        const ConvShape s = shape(sizes);
        py::gil_scoped_release release;
        check_sparse_conv2d(s, w.raw);
        return choose_sparse_conv2d(kernel, s, w.raw, dtype(x_type)).prepare(s, w.raw);
      },
      py::arg("shape"), py::arg("weights"), py::arg("x_dtype"), py::arg("kernel") = "",
      "Weights in the order of the chosen kernel; the shape is N C H W K R S P Q, strides, paddings, "
      "dilations, groups.");
}

}  // namespace

void bind_sparse_conv2d(py::module_& m) {
  bind_layers(m);
  bind_table(m);
}

}  // namespace vpns
