// mmkern._C: what Python asks about this machine and this build. Loading it also registers the CPU
// kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const mmkern::Isa isa : mmkern::available_isas()) names.push_back(mmkern::isa_name(isa));
  return names;
}

void set_isa(const std::string& name) {
  for (const mmkern::Isa isa : mmkern::available_isas()) {
    if (mmkern::isa_name(isa) == name) return mmkern::set_isa(isa);
  }
  throw std::invalid_argument("isa: expected one of those this processor runs, got '" + name + "'");
}

py::dict build() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["isas"] = MMKERN_ISAS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about this processor and build, and the choice of instruction set.";
  m.def("isas", &isas, "Names of the instruction sets this processor can run, in rising order.");
  m.def(
      "isa", [] { return mmkern::isa_name(mmkern::current_isa); },
      "Name of the instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use the kernels compiled for `name` in this process.");
  m.def("build", &build, "Compiler and instruction sets of this build.");
}
