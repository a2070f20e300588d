// The PTX runner for Python, through ctypes.
#include "ptx.h"

extern "C" {

struct RunOptions {
  int grid[3], threads[3];
  int dynamic_shared, order, eager, strict_proxies, ties;
};
struct RunCounts {
  uint64_t switches, matrix_loads, matrix_conflicts, shared_conflicts, products, tied;
};

// Returns an error, or "" if all went well. `counts` may be null.
const char* mmkern_run_ptx(const char* module, const char* entry, const RunOptions* options,
                           const void** buffers, const size_t* sizes, int buffer_count,
                           const uint8_t** parameters, int parameter_count, RunCounts* counts) {
  static std::string message;
  message.clear();
  try {
    static std::map<std::pair<std::string, std::string>, ptx::Program> decoded;
    auto& program = decoded[{module, entry}];
    if (program.code.empty()) program = ptx::decode(module, entry);
    emulator::Launch launch;
    std::copy(options->grid, options->grid + 3, launch.grid);
    launch.order = unsigned(options->order);
    launch.eager = options->eager;
    launch.strict_proxies = options->strict_proxies;
    launch.ties = options->ties;
    for (int i = 0; i < buffer_count; ++i)
      launch.buffers.push_back({static_cast<const uint8_t*>(buffers[i]), sizes[i]});
    ptx::run(launch, program, {parameters, parameters + parameter_count}, options->threads,
             options->dynamic_shared);
    if (counts)
      *counts = {launch.switches,         launch.matrix_loads, launch.matrix_conflicts,
                 launch.shared_conflicts, launch.products,     launch.tied};
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

// Decodes every kernel of a module without running it.
const char* mmkern_check_ptx(const char* module) {
  static std::string message;
  message.clear();
  try {
    for (const auto& entry : ptx::Parser::entries(module)) ptx::decode(module, entry);
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}

}  // extern "C"
