// mmkern._C: what Python asks about this machine and this build. Loading it also registers the CPU
// kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/ceilings.h"
#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const mmkern::Isa isa : mmkern::kIsas) {
    if (mmkern::has_isa(isa)) names.push_back(mmkern::isa_name(isa));
  }
  return names;
}

void set_isa(const std::string& name) {
  std::string known;
  for (const mmkern::Isa isa : mmkern::kIsas) {
    if (!mmkern::has_isa(isa)) continue;
    if (mmkern::isa_name(isa) == name) {
      mmkern::current_isa = isa;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(mmkern::isa_name(isa));
  }
  throw std::invalid_argument("isa: this processor runs " + known + ", not '" + name + "'");
}

// The processor's own name for itself: 48 bytes in leaves 0x80000002 to 4.
std::string processor() {
#if defined(__x86_64__)
  unsigned words[12];
  for (unsigned leaf = 0; leaf < 3; ++leaf) {
    unsigned* w = words + 4 * leaf;
    if (!__get_cpuid(0x80000002u + leaf, w, w + 1, w + 2, w + 3)) return "unknown x86-64";
  }
  const char* text = reinterpret_cast<const char*>(words);
  std::string name(text, strnlen(text, sizeof(words)));
  name.erase(0, name.find_first_not_of(' '));
  return name.substr(0, name.find_last_not_of(' ') + 1);
#else
  return "unknown";
#endif
}

py::dict build() {
  std::vector<std::string> compiled;
  for (const mmkern::Isa isa : mmkern::kIsas) compiled.push_back(mmkern::isa_name(isa));
  py::dict info;
#if defined(__clang__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "GCC " __VERSION__;
#endif
  info["isas"] = compiled;
  info["torch_target"] = std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
                         std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
  info["cuda_architectures"] = std::vector<std::string>();
  return info;
}

void check_seconds(double seconds) {
  if (!(seconds > 0)) throw std::invalid_argument("seconds: expected more than 0");
}

void check_bytes(int64_t bytes) {
  if (bytes < 4096) throw std::invalid_argument("bytes: expected at least 4096");
}

std::optional<double> bf16_dot_gflops(double seconds) {
  check_seconds(seconds);
  const double rate = mmkern::bf16_dot_gflops(seconds);
  return rate > 0 ? std::optional<double>(rate) : std::nullopt;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.doc() = "Facts about this processor and build, and the choice of instruction set.";
  m.def("processor", &processor, "Name of the processor, as it gives it.");
  m.def("isas", &isas, "Names of the instruction sets this processor can run, in rising order.");
  m.def(
      "isa", [] { return mmkern::isa_name(mmkern::current_isa); },
      "Name of the instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use the kernels compiled for `name` in this process; ValueError if it cannot run them.");
  m.def("build", &build,
        "compiler; isas compiled in; torch_target, the oldest torch this build loads in; "
        "cuda_architectures.");
  m.def(
      "fma_gflops",
      [](double seconds) {
        check_seconds(seconds);
        return mmkern::fma_gflops(seconds);
      },
      py::arg("seconds") = 0.2, Unlocked(),
      "float32 multiply-add GFLOP/s of torch's threads with the instruction set in use.");
  m.def("bf16_dot_gflops", &bf16_dot_gflops, py::arg("seconds") = 0.2, Unlocked(),
        "bf16 dot-product GFLOP/s, likewise; None where the set has no such instruction.");
  m.def(
      "copy_gbs",
      [](int64_t bytes, double seconds) {
        check_bytes(bytes), check_seconds(seconds);
        return mmkern::copy_gbs(bytes, seconds);
      },
      py::arg("bytes"), py::arg("seconds") = 0.2, Unlocked(),
      "GB/s moved when copying `bytes`: each counted once read and once written.");
  m.def(
      "read_gbs",
      [](int64_t bytes, double seconds) {
        check_bytes(bytes), check_seconds(seconds);
        return mmkern::read_gbs(bytes, seconds);
      },
      py::arg("bytes"), py::arg("seconds") = 0.2, Unlocked(), "GB/s read from `bytes`.");
}
