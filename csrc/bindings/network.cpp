// What Python sees of the runtime: a plan's bytes in, a network that runs on addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/convert.h"
#include "cpu/isa.h"
#include "runtime/network.h"

namespace py = pybind11;

namespace vpns {
namespace {

// Address, type, strides of n, c, h, w.
ImageTensor image_tensor(uintptr_t address, const std::string& type, const std::vector<int64_t>& strides) {
  check(strides.size() == 4, "Network.run", "4 strides", strides.size());
  return {pointer<void>(address), dtype(type), strides[0], strides[1], strides[2], strides[3]};
}

using Tensors = std::vector<std::tuple<uintptr_t, std::string, std::vector<int64_t>>>;

std::vector<ImageTensor> image_tensors(const Tensors& tensors) {
  std::vector<ImageTensor> made;
  for (const auto& [address, type, strides] : tensors) made.push_back(image_tensor(address, type, strides));
  return made;
}

}  // namespace

void bind_network(py::module_& m) {
  py::class_<ExecutionContext>(m, "ExecutionContext").def(py::init<>());
  py::class_<Network>(m, "Network")
      .def(py::init([](uintptr_t bytes, int64_t size, int64_t segment) {
             py::gil_scoped_release release;
             return std::make_unique<Network>(pointer<const uint8_t>(bytes), size, segment);
           }),
           py::arg("bytes"), py::arg("size"), py::arg("segment") = kWholePlan,
           "The bytes of a plan.bin, which must outlive the network; of one that torch runs in part, which steps.")
      .def_property_readonly("inputs", [](const Network& self) { return self.plan().inputs; }, "Values it takes.")
      .def_property_readonly("outputs", [](const Network& self) { return self.plan().outputs; }, "Values it gives.")
      .def_property_readonly("kernels", &Network::kernels, "Of each step; empty where it has no weights.")
      .def("set_chunk", &Network::set_chunk, py::arg("chunk"),
           "Images that a thread takes at a time; not while it runs.")
      .def(
          "set_strips",
          [](Network& self, const std::vector<std::pair<int64_t, int64_t>>& groups, int64_t cache_bytes) {
            std::vector<StepSpan> spans;
            for (const auto& [first, count] : groups) spans.push_back({first, count});
            self.set_strips(spans, cache_bytes > 0 ? cache_bytes : l2_cache_bytes());
          },
          py::arg("groups"), py::arg("cache_bytes") = 0,
          "First step and number of steps of each group that runs by strips of rows, and the bytes that the rows of a "
          "strip should fit, 0: a core's second-level cache; not while it runs.")
      .def_property_readonly(
          "strips",
          [](const Network& self) {
            std::vector<std::tuple<int64_t, int64_t, int64_t>> found;
            for (const StripGroup& group : self.strips())
              found.emplace_back(group.steps.first, group.steps.count, group.rows);
            return found;
          },
          "Of each group that runs by strips: first step, number of steps, rows of the last one in a strip.")
      .def_property_readonly("bytes_per_image", &Network::bytes_per_image, "Of a thread's working memory.")
      .def(
          "run",
          [](const Network& self, ExecutionContext& context, const Tensors& x, const Tensors& y, int64_t images,
             int threads, uintptr_t seconds) {
            const std::vector<ImageTensor> in = image_tensors(x), out = image_tensors(y);
            py::gil_scoped_release release;
            self.run(context, in, out, images, threads, pointer<double>(seconds));
          },
          py::arg("context"), py::arg("x"), py::arg("y"), py::arg("images"), py::arg("threads"), py::arg("seconds") = 0,
          "One call; x and y are (address, dtype, strides) of each input and output; `seconds` is 0 or the address of "
          "a double for each step, to which its time is added.");
}

}  // namespace vpns
