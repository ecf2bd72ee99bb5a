// Declarations that the parts of the runtime share: fibers and warps (emu_scheduler.cpp), warp-wide operations and
// asynchronous copies (emu_warp.cpp), memory checks (emu_memory.cpp), and replacements of torch and of the CUDA runtime
// for the entry functions (emu_host.cpp).
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cuda_emu.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

namespace emu {

// ---- settings, counters, reports ---------------------------------------------------------------------------------

struct Settings {
  uint64_t seed = 0;           // 0: threads and blocks in order; 1: in reverse; else a random order with this seed
  bool late_copies = true;     // data of cp.async arrive when waited for, the latest legal moment; else when issued
  bool check_memory = false;   // check every access that the instrumented kernels announce
  bool fill_outputs = true;    // with NaN, which shows what a kernel forgets to write; off if launches are recorded
  int multiprocessors = 1;     // of the device
  // If set, it executes the launches instead, on the same memory. It returns false if that failed.
  std::function<bool(const cudaLaunchConfig_t&, const KernelCall&)> executor;
};

struct Counters {
  uint64_t launches, blocks, switches, collectives, mma, ldmatrix, bank_conflicts, async_copies, accesses;
};

struct Report {
  std::string kind, message;
  uintptr_t kernel = 0, code = 0;  // addresses inside this module; 0 if unknown
  uint32_t block[3] = {};
  int thread = -1, other_thread = -1;
  uint64_t count = 1;  // how often the same error occurred
};

extern Settings settings;
extern Counters counters;
extern std::vector<Report> reports;

// Records an error and continues. Another error of the same kind at the same place is only counted.
void note(const char* kind, std::string message, uintptr_t code = 0, int other_thread = -1);
// Records an error and ends the launch. It does not return when called from a fiber.
void fail(const char* kind, std::string message, uintptr_t code = 0);

// ---- fibers and warps ---------------------------------------------------------------------------------------------

struct AsyncCopy {
  void* dst;
  const void* src;
  bool valid;
  uintptr_t code;
};

struct Fiber {
  void* stack_pointer;
  char* stack;  // kStackBytes above a guard page
  EmuIndex index;
  int thread;
  bool done;
  const char* waits_at;
  void* fake_stack;  // AddressSanitizer's
  std::vector<AsyncCopy> copies;
  std::vector<int> groups;  // the number of copies of each committed group, the oldest first
  int uncommitted;
};

constexpr size_t kStackBytes = EMU_ASAN ? 256 << 10 : 64 << 10;

// Lanes that meet at a warp-wide operation. Each lane stores a pointer to its operands, and the last one does the work
// for all lanes.
struct Meeting {
  uint32_t mask, arrived;
  int kind;
  void* operands[32];
};

struct Warp {
  Meeting meetings[4];
  uint16_t epoch;  // counts __syncwarp since the last __syncthreads
};

struct Launch {
  KernelCall call;
  unsigned char* shared;
  size_t shared_bytes;
  int threads;
  uint32_t epoch, block_epoch, first_epoch;  // now; when this block began; when the launch began
};

extern Fiber* current;  // null on the host's stack
extern std::vector<Fiber> fibers;
extern std::vector<Warp> warps;
extern Launch active;

// The calling fiber waits until make_ready is called for it.
void wait_here(const char* what);
void make_ready(int thread);

// ---- memory --------------------------------------------------------------------------------------------------------

enum class Access { read, write, atomic };

// Checks an access of the current fiber and records it. To be called only if settings.check_memory is set.
void access(const void* p, size_t bytes, Access kind, uintptr_t code);
void mark_in_flight(const void* p, size_t bytes, bool in_flight);

// Global memory that kernels may touch. `undefined`: nothing has been written to it yet. Buffers are recorded only if
// accesses are checked, by the runtime or by an executor.
void add_buffer(uintptr_t id, const void* p, size_t bytes, std::string name, bool undefined);
void remove_buffer(uintptr_t id);
void remove_all_buffers();
struct Buffer {
  uintptr_t begin, end;
  std::string name;
  bool undefined;
};
std::vector<Buffer> all_buffers();

// Registers the shared memory of the launch that begins, and at the first call the segments of the module.
void enter_launch_memory();
void leave_launch_memory();

// Whether the kernel may have this amount of dynamic shared memory: more than 48 KiB only after cudaFuncSetAttribute.
bool shared_memory_allowed(const void* kernel, size_t bytes);

// ---- torch ---------------------------------------------------------------------------------------------------------

// Implements the ops that `list_ops` (emu_kernels.h) has remembered, for CPU tensors, in this namespace of torch.ops.
void register_ops(const char* name_space);

#define EMU_CALLER uintptr_t(__builtin_return_address(0))

}  // namespace emu
