// What the entry function of an op calls: torch's allocator and accessors, wrapped so that the memory checks know every
// tensor, and parts of the CUDA runtime. The linker replaces each wrapped torch function `f` by `__wrap_f`.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <list>
#include <map>

#include "emu_kernels.h"
#include "emu_runtime.h"

namespace emu {
namespace {

char stream_object;
int open_device_guards;
std::map<const void*, int> shared_limits;
constexpr int kDefaultShared = 48 << 10, kOptInShared = 99 << 10;  // the smallest of compute capabilities 8.0 ... 12.0

struct Shape {
  std::string text = "tensor (";
  size_t bytes = 0;  // from the first element to the last one, with everything between them
};

Shape shape_of(AtenTensorHandle tensor) {
  Shape shape;
  int64_t dims = 0, elements = 0, size = 0, stride = 0;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dims);
  aoti_torch_get_numel(tensor, &elements);
  aoti_torch_get_dtype(tensor, &dtype);
  int64_t reach = 1;
  for (int64_t d = 0; d < dims; ++d) {
    aoti_torch_get_size(tensor, d, &size);
    aoti_torch_get_stride(tensor, d, &stride);
    reach += (size - 1) * stride;
    shape.text += (d == 0 ? "" : ", ") + std::to_string(size);
  }
  shape.text += ")";
  shape.bytes = elements == 0 ? 0 : size_t(reach) * aoti_torch_dtype_element_size(dtype);
  return shape;
}

void add_tensor(AtenTensorHandle tensor, const void* data, bool undefined) {
  if (!settings.check_memory && !settings.executor) return;
  const Shape shape = shape_of(tensor);
  add_buffer(uintptr_t(tensor), data, shape.bytes, shape.text, undefined);
}

}  // namespace

void* current_stream() { return &stream_object; }

// A static inside a function, because static initialisers of other files use it before this file's statics exist.
std::vector<void (*)(Ops&)>& listed() {
  static std::vector<void (*)(Ops&)> files;
  return files;
}

bool list_ops(void (*implement)(Ops&)) {
  listed().push_back(implement);
  return true;
}

bool announce_accesses() {
  settings.check_memory = true;
  return true;
}

void register_ops(const char* name_space) {
  // Never destroyed: torch's dispatcher may already be gone when this module's statics are destroyed.
  static auto* const registered = new std::list<Ops>;
  Ops& ops = registered->emplace_back(Ops::Kind::IMPL, name_space, "CPU", __FILE__, __LINE__);
  for (const auto implement : listed()) implement(ops);
}

}  // namespace emu

extern "C" {

AOTITorchError __real_aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                               AtenTensorHandle*);
AOTITorchError __wrap_aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                               int32_t dtype, int32_t device, int32_t, AtenTensorHandle* out) {
  const AOTITorchError error = __real_aoti_torch_empty_strided(dims, sizes, strides, dtype, device, -1, out);
  if (error != AOTI_TORCH_SUCCESS) return error;
  void* data = nullptr;
  aoti_torch_get_data_ptr(*out, &data);
  if (data != nullptr && emu::settings.fill_outputs) std::memset(data, 0xFF, emu::shape_of(*out).bytes);
  emu::add_tensor(*out, data, true);
  return error;
}

AOTITorchError __real_torch_get_mutable_data_ptr(AtenTensorHandle, void**);
AOTITorchError __wrap_torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** out) {
  const AOTITorchError error = __real_torch_get_mutable_data_ptr(tensor, out);
  if (error == AOTI_TORCH_SUCCESS) emu::add_tensor(tensor, *out, false);
  return error;
}

AOTITorchError __real_torch_get_const_data_ptr(AtenTensorHandle, const void**);
AOTITorchError __wrap_torch_get_const_data_ptr(AtenTensorHandle tensor, const void** out) {
  const AOTITorchError error = __real_torch_get_const_data_ptr(tensor, out);
  if (error == AOTI_TORCH_SUCCESS) emu::add_tensor(tensor, *out, false);
  return error;
}

AOTITorchError __real_aoti_torch_delete_tensor_object(AtenTensorHandle);
AOTITorchError __wrap_aoti_torch_delete_tensor_object(AtenTensorHandle tensor) {
  emu::remove_buffer(uintptr_t(tensor));
  return __real_aoti_torch_delete_tensor_object(tensor);
}

// Entry functions ask each device only once for its number of multiprocessors. So each such number is a separate
// device, whose index is that number.
AOTITorchError __wrap_aoti_torch_get_device_index(AtenTensorHandle, int32_t* out) {
  *out = emu::settings.multiprocessors;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError __wrap_aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* out) {
  ++emu::open_device_guards;
  *out = reinterpret_cast<DeviceGuardHandle>(&emu::open_device_guards);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError __wrap_aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --emu::open_device_guards;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** out) {
  *out = emu::open_device_guards > 0 ? emu::current_stream() : nullptr;
  return AOTI_TORCH_SUCCESS;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return "the emulation found an error";
    default: return "invalid argument";
  }
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  if (value > emu::kOptInShared) return cudaErrorInvalidValue;
  emu::shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = device;
  return cudaSuccess;
}

}  // extern "C"

namespace emu {

bool shared_memory_allowed(const void* kernel, size_t bytes) {
  const auto limit = shared_limits.find(kernel);
  return bytes <= size_t(limit == shared_limits.end() ? kDefaultShared : limit->second);
}

}  // namespace emu
