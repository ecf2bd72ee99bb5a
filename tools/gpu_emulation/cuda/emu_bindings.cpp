// The controls of the emulation in Python; the kernels themselves are called through torch.
#include <link.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emu_runtime.h"

namespace py = pybind11;

namespace {

// Where this module lies, so that addresses can be looked up in its file.
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

// What Python's executor is told: the kernel's address in the file, the launch, its parameters and the buffers.
py::dict describe(const cudaLaunchConfig_t& config, const emu::KernelCall& call) {
  py::list parameters, buffers;
  for (size_t i = 0; i < call.parameter_count; ++i)
    parameters.append(py::bytes(static_cast<const char*>(call.parameters[i].value), call.parameters[i].bytes));
  for (const emu::Buffer& buffer : emu::all_buffers())
    buffers.append(py::make_tuple(buffer.begin, buffer.end, buffer.name, buffer.undefined));
  py::dict launch;
  launch["kernel"] = uintptr_t(call.kernel) - module_base();
  launch["grid"] = py::make_tuple(config.gridDim.x, config.gridDim.y, config.gridDim.z);
  launch["block"] = py::make_tuple(config.blockDim.x, config.blockDim.y, config.blockDim.z);
  launch["shared_bytes"] = config.dynamicSmemBytes;
  launch["parameters"] = parameters;
  launch["buffers"] = buffers;
  return launch;
}

void begin(uint64_t seed, bool late_copies, int multiprocessors, bool fill_outputs, py::object executor) {
  emu::settings.seed = seed;
  emu::settings.late_copies = late_copies;
  emu::settings.check_memory = EMU_CHECK_MEMORY;
  emu::settings.multiprocessors = multiprocessors;
  emu::settings.fill_outputs = fill_outputs;
  emu::settings.executor = nullptr;
  if (!executor.is_none())
    emu::settings.executor = [executor](const cudaLaunchConfig_t& config, const emu::KernelCall& call) {
      const py::gil_scoped_acquire gil;  // torch calls operators without it
      return executor(describe(config, call)).cast<bool>();
    };
  emu::reports.clear();
  emu::counters = {};
  emu::remove_all_buffers();
}

void end() {
  emu::settings.executor = nullptr;  // Python's object must not outlive Python
  emu::settings.fill_outputs = true;
}

py::list reports() {
  const uintptr_t base = module_base();
  py::list result;
  for (const emu::Report& report : emu::reports) {
    py::dict entry;
    entry["kind"] = report.kind;
    entry["message"] = report.message;
    entry["kernel"] = report.kernel == 0 ? 0 : report.kernel - base;
    entry["code"] = report.code == 0 ? 0 : report.code - base;
    entry["block"] = py::make_tuple(report.block[0], report.block[1], report.block[2]);
    entry["thread"] = report.thread;
    entry["other_thread"] = report.other_thread;
    entry["count"] = report.count;
    result.append(entry);
  }
  return result;
}

py::dict counters() {
  const emu::Counters& c = emu::counters;
  py::dict result;
  result["launches"] = c.launches;
  result["blocks"] = c.blocks;
  result["switches"] = c.switches;
  result["collectives"] = c.collectives;
  result["mma"] = c.mma;
  result["ldmatrix"] = c.ldmatrix;
  result["bank_conflicts"] = c.bank_conflicts;
  result["async_copies"] = c.async_copies;
  result["accesses"] = c.accesses;
  return result;
}

void add_buffer(uintptr_t address, size_t bytes, std::string name) {
  emu::add_buffer(address, reinterpret_cast<const void*>(address), bytes, std::move(name), false);
}

}  // namespace

PYBIND11_MODULE(cuda_emulation_runtime, m) {
  m.def("begin", &begin, py::arg("seed"), py::arg("late_copies"), py::arg("multiprocessors"),
        py::arg("fill_outputs"), py::arg("executor"));
  m.def("end", &end);
  m.def("reports", &reports);
  m.def("counters", &counters);
  m.def("add_buffer", &add_buffer, py::arg("address"), py::arg("bytes"), py::arg("name"));
}
