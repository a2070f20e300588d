// The kernels of csrc/cuda as ops on CPU tensors: torch.ops.mmkern_cuda with the emulator in the
// place of a GPU.
#include <dlfcn.h>

#include "buffers.h"
#include "cuda/plan.h"
#include "emulate.h"
#include "ptx.h"

namespace emulator {
namespace {

std::vector<Buffer> allowed;
std::string module;  // PTX; empty: run what g++ compiled
std::map<std::string, ptx::Program> decoded;
unsigned order = 0;
uint64_t launches = 0, shared_conflicts = 0;
int most_blocks = 0;
std::string message;

}  // namespace

void allow(const void* data, size_t bytes) {
  allowed.push_back({static_cast<const uint8_t*>(data), bytes});
}

const char* launch(void* kernel, int grid, int threads, int shared, const uint8_t* arguments,
                   const std::function<void()>& body) {
  Launch l;
  l.grid[0] = most_blocks ? std::min(grid, most_blocks) : grid;
  l.order = order;
  l.buffers = std::move(allowed);
  allowed.clear();
  ++launches;
  try {
    if (module.empty()) {
      run(l, threads, shared, body);
    } else {
      Dl_info info;
      if (!dladdr(kernel, &info) || !info.dli_sname) throw Failure("the kernel has no name");
      ptx::Program& program = decoded[info.dli_sname];
      if (program.code.empty()) program = ptx::decode(module, info.dli_sname);
      ptx::run(l, program, {arguments}, {threads, 1, 1}, shared);
    }
  } catch (const std::exception& e) {
    message = e.what();
    return message.c_str();
  }
  shared_conflicts += l.shared_conflicts;
  return nullptr;
}

}  // namespace emulator

extern "C" {
// From now on: PTX to run, or "" for what g++ compiled; the seed of the order of threads.
void mmkern_emulate(const char* ptx, unsigned order) {
  if (emulator::module != ptx) emulator::decoded.clear();
  emulator::module = ptx;
  emulator::order = order;
  emulator::launches = emulator::shared_conflicts = 0;
}
// No launch has more blocks; 0: no such limit. Kernels step over the grid.
void mmkern_most_blocks(int blocks) { emulator::most_blocks = blocks; }
uint64_t mmkern_launches() { return emulator::launches; }
// threads, per, block, grid, shared of a row kernel's launch.
void mmkern_plan_rows(int64_t rows, int64_t width, int64_t* found) {
  const auto plan = mmkern::plan_rows(rows, width);
  const int64_t all[] = {plan.threads, plan.per, plan.block, plan.grid, plan.shared};
  std::copy(all, all + 5, found);
}
// rows, n1, n2, inner, width, then four steps; false: no four strides tell these rows.
bool mmkern_collapse(const int64_t* sizes, const int64_t* strides, int rank, int64_t dim,
                     int64_t* found) {
  mmkern::RowShape shape{};
  std::vector<std::array<int64_t, 4>> steps;
  if (!mmkern::collapse({sizes, sizes + rank}, {{strides, strides + rank}}, dim, &shape, &steps))
    return false;
  const int64_t all[] = {shape.rows, shape.n1, shape.n2, shape.inner, shape.width};
  std::copy(all, all + 5, found);
  std::copy(steps[0].begin(), steps[0].end(), found + 5);
  return true;
}
uint64_t mmkern_shared_conflicts() { return emulator::shared_conflicts; }
}
