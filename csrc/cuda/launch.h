// What the entry functions of the CUDA kernels share on the host: the device and its current stream, allocation,
// launches that raise errors, and the registration of ops. Nothing here synchronises, so a CUDA graph can capture the
// launches.
//
// The library is not linked against torch's CUDA libraries: it finds the current stream through a weak symbol, which a
// CPU build of torch does not have.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <mutex>
#include <utility>

#include "../ceil_div.h"
#include "../checks.h"
#include "../empty.h"
#include "device.cuh"

// Names the ops that a file implements: `VAR_CUDA_OPS(m) { m.impl(...); }`. The emulation defines its own macro.
#ifndef VAR_CUDA_OPS
#define VAR_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(var_kernels, CUDA, m)
#endif

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace var_kernels {

// The device of a tensor, and its current stream. While an object lives, its device is the current one.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  int32_t type, index;
  cudaStream_t stream;

  explicit OnDevice(const torch::stable::Tensor& tensor)
      : guard(tensor.get_device_index()), type(0), index(tensor.get_device_index()), stream(nullptr) {
    VAR_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "torch", "a build with CUDA", "one without");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
  }

  // Makes a dense tensor on this device, with unspecified contents.
  torch::stable::Tensor empty(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) const {
    return empty_dense(sizes, dtype, type, index);
  }
};

// Calls f(T{}), T being the tensor's element type: fp32, bf16 or fp16.
template <class F>
void with_dtype(const torch::stable::Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return f(float());
    case torch::headeronly::ScalarType::BFloat16: return f(bf16());
    default: return f(fp16());
  }
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic shared memory
};

inline void check_cuda(cudaError_t error, const char* kernel, const LaunchShape& shape, int32_t device) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears the error, so that no later call of another library finds it again
  const dim3 grid = shape.grid, block = shape.block;
  STD_TORCH_CHECK(false, "var_kernels: kernel ", kernel, ": ", cudaGetErrorString(error), " (grid ", grid.x, "x",
                  grid.y, "x", grid.z, ", block ", block.x, "x", block.y, "x", block.z, ", ", shape.shared_bytes,
                  " bytes of shared memory, device ", device, ")");
}

// A kernel must be allowed more than 48 KiB of shared memory on each device. The limit is never lowered: else an
// earlier shape would fail.
inline void allow_shared_memory(const void* kernel, const char* name, const LaunchShape& shape, int32_t device) {
  constexpr size_t kAlwaysAllowed = 48 << 10;
  if (shape.shared_bytes <= kAlwaysAllowed) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int32_t>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& bytes = allowed[{kernel, device}];
  if (shape.shared_bytes <= bytes) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes)), name,
             shape, device);
  bytes = shape.shared_bytes;
}

// The number of multiprocessors of the device. Every call chooses its grid by it, so the driver is asked once only.
inline int multiprocessors(const OnDevice& device) {
  static std::mutex mutex;
  static std::map<int32_t, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& count = known[device.index];
  if (count == 0) {
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device.index);
    VAR_CHECK(error == cudaSuccess, "device", "a number of multiprocessors", cudaGetErrorString(error));
  }
  return count;
}

// Starts `kernel` in the device's current stream. If that fails, it raises a RuntimeError with the kernel's name and
// the launch configuration. An error while the kernel runs is reported by the next call that synchronises, as always in
// CUDA.
template <class... P, class... A>
void launch(const OnDevice& device, const char* name, void (*kernel)(P...), const LaunchShape& shape,
            A&&... arguments) {
  allow_shared_memory(reinterpret_cast<const void*>(kernel), name, shape, device.index);
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = device.stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<A>(arguments)...), name, shape, device.index);
}

}  // namespace var_kernels
