// What Python sees of the runtime: a plan's bytes in, a network that runs on addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/convert.h"
#include "runtime/network.h"

namespace py = pybind11;

namespace vpns {
namespace {

// Address, type, strides of n, c, h, w.
ImageTensor image_tensor(uintptr_t address, const std::string& type, const std::vector<int64_t>& strides) {
  check(strides.size() == 4, "Network.run", "4 strides", strides.size());
  return {pointer<void>(address), dtype(type), strides[0], strides[1], strides[2], strides[3]};
}

}  // namespace

void bind_network(py::module_& m) {
  py::class_<ExecutionContext>(m, "ExecutionContext").def(py::init<>());
  py::class_<Network>(m, "Network")
      .def(py::init([](uintptr_t bytes, int64_t size) {
             py::gil_scoped_release release;
             return std::make_unique<Network>(pointer<const uint8_t>(bytes), size);
           }),
           py::arg("bytes"), py::arg("size"), "The bytes of a plan.bin, which must outlive the network.")
      .def_property_readonly("kernels", &Network::kernels, "Of each step; empty where it has no weights.")
      .def_property_readonly("bytes_per_image", &Network::bytes_per_image, "Of a thread's working memory.")
      .def(
          "run",
          [](const Network& self, ExecutionContext& context, uintptr_t x, const std::string& x_type,
             const std::vector<int64_t>& x_strides, uintptr_t y, const std::string& y_type,
             const std::vector<int64_t>& y_strides, int64_t images, int threads, uintptr_t seconds) {
            const ImageTensor in = image_tensor(x, x_type, x_strides), out = image_tensor(y, y_type, y_strides);
            py::gil_scoped_release release;
            self.run(context, in, out, images, threads, pointer<double>(seconds));
          },
          py::arg("context"), py::arg("x"), py::arg("x_dtype"), py::arg("x_strides"), py::arg("y"), py::arg("y_dtype"),
          py::arg("y_strides"), py::arg("images"), py::arg("threads"), py::arg("seconds") = 0,
          "One call; `seconds` is 0 or the address of a double for each step, to which its time is added.");
}

}  // namespace vpns
