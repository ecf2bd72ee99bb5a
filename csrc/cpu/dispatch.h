// Functions that the C++ entries of the ops (`<stem>.cpp`, compiled for any machine) share: the choice of the
// instruction set, work over threads, and scratch memory for each thread.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "../ceil_div.h"
#include "../empty.h"

namespace var_kernels {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The best level that this machine has and this library was built for; VAR_KERNELS_ISA forces a lower one.
Isa active_isa();

// Each `<stem>.isa.cpp` defines one table of function pointers per level, `extern const Table table` inside its
// level's namespace. VAR_DECLARE_ISA_TABLES(Table, table) declares them and defines `const Table& table()`.
#if defined(VAR_ISA_X86)
#define VAR_DECLARE_ISA_TABLES(Table, name)                                              \
  namespace portable { extern const Table name; }                                        \
  namespace avx2 { extern const Table name; }                                            \
  namespace avx512 { extern const Table name; }                                          \
  namespace avx512_bf16 { extern const Table name; }                                     \
  namespace amx { extern const Table name; }                                             \
  inline const Table& name() {                                                           \
    static const Table* const tables[] = {&portable::name, &avx2::name, &avx512::name,   \
                                          &avx512_bf16::name, &amx::name};               \
    return *tables[int(active_isa())];                                                   \
  }
#else
#define VAR_DECLARE_ISA_TABLES(Table, name)      \
  namespace portable { extern const Table name; } \
  inline const Table& name() { return portable::name; }
#endif

// Runs f(task) for every task in [0, tasks). A worker first takes the tasks of its own range in order. The range is the
// same in every call, so that data may still be in its cache. Then the worker helps the others, so that uneven tasks (a
// query tile of the last scale sees a hundred times the keys of the first) are balanced. Each task writes its own
// outputs, so the result does not depend on which worker ran it.
template <class F>
void parallel_tasks(int64_t tasks, const F& f) {
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (workers <= 1) {
    for (int64_t task = 0; task < tasks; ++task) f(task);
    return;
  }
  const auto begin_of = [=](int64_t worker) { return tasks * worker / workers; };
  std::vector<std::atomic<int64_t>> next(workers);
  for (int64_t worker = 0; worker < workers; ++worker) next[worker] = begin_of(worker);
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = 0; i < workers; ++i) {
        const int64_t owner = (worker + i) % workers;
        for (int64_t task = next[owner]++; task < begin_of(owner + 1); task = next[owner]++) f(task);
      }
  });
}

// The same for a known number of multiply-adds. If they take less than about ten microseconds, one thread runs all
// tasks, because waking the others costs more than it saves.
template <class F>
void parallel_tasks(int64_t tasks, int64_t work, const F& f) {
  constexpr int64_t serial_work = 1 << 20;
  if (work > serial_work) return parallel_tasks(tasks, f);
  for (int64_t task = 0; task < tasks; ++task) f(task);
}

// Whether an op that moves `bytes` bytes should store its output past the caches: the next operation would not find
// data larger than three quarters of a common last-level cache (32 MiB) there. Rows of the output must fill whole
// lines.
inline bool stored_past_caches(int64_t bytes, int64_t row_bytes, const void* output) {
  constexpr int64_t kStreamBytes = 24 << 20, kLine = 64;
  return bytes > kStreamBytes && row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(output) % kLine == 0;
}

// At least `floats` floats of 64-byte aligned memory that belongs to the calling thread. It is kept between calls,
// because a fresh allocation of this size would fault in its pages on every call. Its contents are unspecified, and it
// has one user at a time.
float* thread_scratch(int64_t floats);

// A dense CPU tensor with unspecified contents.
inline torch::stable::Tensor empty_cpu(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) {
  return empty_dense(sizes, dtype, aoti_torch_device_type_cpu(), 0);
}

}  // namespace var_kernels
