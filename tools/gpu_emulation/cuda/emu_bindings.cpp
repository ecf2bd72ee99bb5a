// The functions that control the emulation, for Python's ctypes. binding.py declares the same structures. The kernels
// themselves are called through torch.
#include <link.h>

#include "emu_runtime.h"

namespace {

// The address at which this module is loaded. Addresses minus this one can be looked up in the module's file.
uintptr_t module_base() {
  uintptr_t base = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
          if (uintptr_t(&threadIdx) < begin || uintptr_t(&threadIdx) >= begin + info->dlpi_phdr[i].p_memsz) continue;
          *static_cast<uintptr_t*>(out) = info->dlpi_addr;
          return 1;
        }
        return 0;
      },
      &base);
  return base;
}

struct BufferRecord {
  uint64_t begin, end;
  const char* name;
  int undefined;
};

// A launch as Python's executor gets it: the kernel's address in the file, the launch, its parameters and the buffers.
struct LaunchRecord {
  uint64_t kernel, shared_bytes;
  unsigned grid[3], block[3];
  uint64_t parameter_count;
  const emu::Parameter* parameters;
  uint64_t buffer_count;
  const BufferRecord* buffers;
};

struct ReportRecord {
  const char *kind, *message;
  uint64_t kernel, code;  // addresses in the file, 0 if unknown
  unsigned block[3];
  int thread, other_thread;
  uint64_t count;
};

using Executor = int (*)(const LaunchRecord*);

bool execute(Executor executor, const cudaLaunchConfig_t& config, const emu::KernelCall& call) {
  const std::vector<emu::Buffer> buffers = emu::all_buffers();
  std::vector<BufferRecord> records;
  for (const emu::Buffer& buffer : buffers)
    records.push_back({buffer.begin, buffer.end, buffer.name.c_str(), buffer.undefined});
  const dim3 grid = config.gridDim, block = config.blockDim;
  const LaunchRecord launch = {uintptr_t(call.kernel) - module_base(), config.dynamicSmemBytes, {grid.x, grid.y, grid.z},
                               {block.x, block.y, block.z}, call.parameter_count, call.parameters, records.size(),
                               records.data()};
  return executor(&launch) != 0;
}

}  // namespace

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

EMU_EXPORT void emu_begin(uint64_t seed, int late_copies, int multiprocessors, int fill_outputs, Executor executor) {
  emu::settings.seed = seed;
  emu::settings.late_copies = late_copies != 0;
  emu::settings.multiprocessors = multiprocessors;
  emu::settings.fill_outputs = fill_outputs != 0;
  emu::settings.executor = nullptr;
  if (executor != nullptr)
    emu::settings.executor = [executor](const cudaLaunchConfig_t& config, const emu::KernelCall& call) {
      return execute(executor, config, call);
    };
  emu::reports.clear();
  emu::counters = {};
  emu::remove_all_buffers();
}

EMU_EXPORT void emu_end() {
  emu::settings.executor = nullptr;  // Python's function does not outlive the block that set it
  emu::settings.fill_outputs = true;
}

EMU_EXPORT uint64_t emu_report_count() { return emu::reports.size(); }

// The strings are valid until the next emu_begin.
EMU_EXPORT void emu_report(uint64_t index, ReportRecord* out) {
  const emu::Report& report = emu::reports[index];
  const uintptr_t base = module_base();
  *out = {report.kind.c_str(), report.message.c_str(), report.kernel == 0 ? 0 : report.kernel - base,
          report.code == 0 ? 0 : report.code - base, {report.block[0], report.block[1], report.block[2]},
          report.thread, report.other_thread, report.count};
}

EMU_EXPORT void emu_counters(emu::Counters* out) { *out = emu::counters; }

EMU_EXPORT void emu_add_buffer(uint64_t address, uint64_t bytes, const char* name) {
  emu::add_buffer(address, reinterpret_cast<const void*>(address), bytes, name, false);
}

// Implements the ops of this module in a namespace of torch.ops that has their schemas.
EMU_EXPORT void emu_register_ops(const char* name_space) { emu::register_ops(name_space); }
