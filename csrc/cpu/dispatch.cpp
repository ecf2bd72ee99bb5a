// Chooses the instruction set once per process, and owns the per-thread scratch memory.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>

#include "../checks.h"

namespace var_kernels {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if defined(VAR_ISA_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
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
    const size_t bytes = (size_t(floats) * sizeof(float) + 63) / 64 * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    capacity = floats;
  }
  return memory.get();
}

}  // namespace var_kernels

// Read by Python through ctypes; null when VAR_KERNELS_ISA names no level of this machine (the first op call raises).
extern "C" __attribute__((visibility("default"))) const char* var_kernels_isa() {
  try {
    return var_kernels::kNames[int(var_kernels::active_isa())];
  } catch (...) {
    return nullptr;
  }
}
extern "C" __attribute__((visibility("default"))) int var_kernels_vector_width() {
  constexpr int widths[] = {4, 8, 16, 16};
  try {
    return widths[int(var_kernels::active_isa())];
  } catch (...) {
    return 0;
  }
}
