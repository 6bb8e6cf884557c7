// What Python sees of the machine: its instruction sets, and how fast they multiply.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/convert.h"
#include "cpu/isa.h"
#include "cpu/multiply_rate.h"

namespace py = pybind11;

namespace vpns {

void bind_machine(py::module_& m) {
  m.def("isa_list", &isa_list, "Instruction sets that may be used now, weakest first.");
  m.def("cpu_core", &cpu_core, "What designed its cores: vendor and family; empty where the CPU does not say.");
  m.def("isa_cap", &isa_cap, py::arg("name"), "Never use anything above this instruction set; empty lifts the cap.");
  m.def(
      "multiply_rate",
      [](const std::string& type, int threads) {
        const DType of = dtype(type);
        py::gil_scoped_release release;
        return multiply_rate(of, threads);
      },
      py::arg("dtype"), py::arg("threads"),
      "Billions of operations a second that threads together do at most; 0 where no instruction multiplies the type.");
}

}  // namespace vpns
