// What the doors of the CUDA kernels share on the host: the device and its current stream, allocation, launches whose
// errors are raised, and the registration of ops. Nothing here synchronises, so launches can be captured in a graph.
//
// torch's CUDA half is not linked: the current stream comes through a weak symbol, which a CPU build of torch lacks.
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

// Which ops a file implements: `VAR_CUDA_OPS(m) { m.impl(...); }`. A build for another executor defines its own.
#ifndef VAR_CUDA_OPS
#define VAR_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(var_kernels, CUDA, m)
#endif

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace var_kernels {

// The device of a tensor, made the current one as long as this lives, and its current stream.
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

  // A dense tensor on this device, with unspecified contents.
  torch::stable::Tensor empty(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) const {
    return empty_dense(sizes, dtype, type, index);
  }
};

// f of a zero of the type of a tensor's elements, which are fp32, bf16 or fp16.
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
  cudaGetLastError();  // reported here, so it must not be found again by the next call of another library
  const dim3 grid = shape.grid, block = shape.block;
  STD_TORCH_CHECK(false, "var_kernels: kernel ", kernel, ": ", cudaGetErrorString(error), " (grid ", grid.x, "x",
                  grid.y, "x", grid.z, ", block ", block.x, "x", block.y, "x", block.z, ", ", shape.shared_bytes,
                  " bytes of shared memory, device ", device, ")");
}

// Above 48 KiB a kernel must be told so on each device; never less than before, or an earlier shape would fail.
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

// How many multiprocessors the device has, asked for once: grids are chosen by it in every call.
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

// Starts `kernel` in the device's current stream. RuntimeError with the kernel's name and the configuration where that
// fails; errors while it runs are found by whoever synchronises, as for every kernel.
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
