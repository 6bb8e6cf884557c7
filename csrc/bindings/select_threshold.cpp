// What Python sees of the selection of the threshold.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/convert.h"
#include "cpu/select_threshold.h"

namespace py = pybind11;

namespace vpns {

void bind_select_threshold(py::module_& m) {
  m.def(
      "select_threshold",
      [](const std::vector<uintptr_t>& data, const std::vector<int64_t>& counts, int64_t kept, int threads,
         const std::vector<uintptr_t>& masks, bool all_ties_or_none) {
        std::vector<const float*> tensors;
        std::vector<uint8_t*> targets;
        for (uintptr_t address : data) tensors.push_back(pointer<const float>(address));
        for (uintptr_t address : masks) targets.push_back(pointer<uint8_t>(address));
        py::gil_scoped_release release;
        const Threshold found = select_threshold(tensors, counts, kept, threads, targets, all_ties_or_none);
        return std::make_tuple(found.value, found.ties_kept, found.kept);
      },
      py::arg("data"), py::arg("counts"), py::arg("kept"), py::arg("threads"),
      py::arg("masks") = std::vector<uintptr_t>(), py::arg("all_ties_or_none") = false,
      "(threshold, ties kept, entries kept); writes the masks that are given.");
}

}  // namespace vpns
