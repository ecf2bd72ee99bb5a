// Included before every .cu file, as a precompiled header that serves all of them. It contains CUDA for g++, and
// torch's headers, which take longer to parse than most entry functions.
#pragma once
#include "cuda_emu.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace emu {

using Ops = torch::stable::detail::StableLibrary;

// Remembers a file's ops until the module gets its namespace, so that one object serves every module.
bool list_ops(void (*implement)(Ops&));

// Turns on the memory checks, in a module whose kernels announce their accesses.
bool announce_accesses();
#ifdef __SANITIZE_THREAD__
[[maybe_unused]] static const bool accesses_announced = announce_accesses();
#endif

}  // namespace emu

#define VAR_CUDA_OPS(m)                                                          \
  static void emu_implement(::emu::Ops& m);                                      \
  [[maybe_unused]] static const bool emu_listed = ::emu::list_ops(emu_implement); \
  static void emu_implement(::emu::Ops& m)
