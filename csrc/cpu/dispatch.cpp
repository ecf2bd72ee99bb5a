// Chooses the instruction set once per process, and owns the per-thread scratch memory.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#if defined(VAR_ISA_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "../checks.h"

namespace var_kernels {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(VAR_ISA_X86)
// Whether this process may use the AMX tile registers for bf16. The processor must have them, and the operating system
// must save them; Linux does so since 5.16, for processes that have asked for it.
bool has_amx() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best_isa() {
#if defined(VAR_ISA_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
    return has_amx() ? Isa::amx : Isa::avx512_bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* forced = std::getenv("VAR_KERNELS_ISA");
  if (forced == nullptr || *forced == '\0') return best;
  for (int level = 0; level <= int(best); ++level)
    if (std::strcmp(forced, kNames[level]) == 0) return Isa(level);
  std::string valid;
  for (int level = 0; level <= int(best); ++level) valid += std::string(level ? ", " : "one of ") + kNames[level];
  VAR_CHECK(false, "VAR_KERNELS_ISA", valid, forced);
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

float* thread_scratch(int64_t floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t capacity = 0;
  if (floats > capacity) {
    memory.reset();
    capacity = 0;
    const size_t bytes = round_up(floats * int64_t(sizeof(float)), 64);
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    capacity = floats;
  }
  return memory.get();
}

}  // namespace var_kernels

// Python reads these through ctypes. The result is null (below: 0) if VAR_KERNELS_ISA names no level of this machine;
// the first call of an op then raises.
extern "C" __attribute__((visibility("default"))) const char* var_kernels_isa() {
  try {
    return var_kernels::kNames[int(var_kernels::active_isa())];
  } catch (...) {
    return nullptr;
  }
}
extern "C" __attribute__((visibility("default"))) int var_kernels_vector_width() {
  constexpr int widths[] = {4, 8, 16, 16, 16};
  try {
    return widths[int(var_kernels::active_isa())];
  } catch (...) {
    return 0;
  }
}
