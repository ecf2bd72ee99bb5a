// g++ includes this before a .cu file and can then compile the file. Each CUDA thread becomes a fiber, and the features
// that CUDA C++ or PTX has and C++ does not become calls of the runtime (emu_*.cpp).
#pragma once
#include <cuda_runtime_api.h>  // types; nothing is linked against the CUDA runtime
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#undef __shared__
#define __shared__ static  // blocks run one after another, so one copy in the process serves every block
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

using std::max;
using std::min;

struct EmuIndex {
  unsigned x, y, z;
};
extern EmuIndex threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emu {

enum class Shuffle : int { index, up, down, exclusive_or };

void block_barrier();
void warp_barrier(uint32_t mask = 0xffffffffu);
uint64_t shuffle(uint32_t mask, uint64_t bits, int argument, int width, Shuffle mode);
uint32_t ballot(uint32_t mask, bool predicate);
void before_atomic(void* p, int bytes);
unsigned char* dynamic_shared();
void* current_stream();

struct Parameter {
  const void* value;
  size_t bytes;
};

// A kernel with its arguments. run(call) executes one thread, which reads only the `bytes` bytes at `call`.
struct KernelCall {
  const void* kernel;
  void (*run)(const void* call);
  const void* call;
  size_t bytes;
  const Parameter* parameters;
  size_t parameter_count;
};

// Runs a kernel with one fiber per thread, one block after another.
cudaError_t launch(const cudaLaunchConfig_t& config, const KernelCall& call);

template <class T>
uint64_t to_bits(T v) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof v);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

template <class T, class F>
__attribute__((no_sanitize("thread"))) T atomic_update(T* p, F f) {
  before_atomic(p, sizeof(T));
  const T old = *p;
  *p = f(old);
  return old;
}

// Replaces the wrappers of device.cuh.
namespace ptx {

uint4 load16(const void* p);
void store16(void* p, uint4 v);
uint2 load8(const void* p);
void store8(void* p, uint2 v);
void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t to_tf32(float x);
void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void cp_async16(void* dst, const void* src, bool valid);
void cp_async_commit();
void cp_async_wait_for(int groups_in_flight);
template <int N>
void cp_async_wait() {
  cp_async_wait_for(N);
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

}  // namespace ptx
}  // namespace emu

#define __syncthreads() ::emu::block_barrier()
#define __syncwarp(...) ::emu::warp_barrier(__VA_ARGS__)

template <class T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  return emu::from_bits<T>(emu::shuffle(mask, emu::to_bits(v), lane, width, emu::Shuffle::index));
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return emu::from_bits<T>(emu::shuffle(mask, emu::to_bits(v), int(delta), width, emu::Shuffle::up));
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  return emu::from_bits<T>(emu::shuffle(mask, emu::to_bits(v), int(delta), width, emu::Shuffle::down));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32) {
  return emu::from_bits<T>(emu::shuffle(mask, emu::to_bits(v), lanes, width, emu::Shuffle::exclusive_or));
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emu::ballot(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emu::ballot(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emu::ballot(mask, predicate != 0) == mask; }

template <class T>
T atomicAdd(T* p, T v) {
  return emu::atomic_update(p, [v](T old) { return T(old + v); });
}
template <class T>
T atomicMin(T* p, T v) {
  return emu::atomic_update(p, [v](T old) { return old < v ? old : v; });
}
template <class T>
T atomicMax(T* p, T v) {
  return emu::atomic_update(p, [v](T old) { return old < v ? v : old; });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(unsigned bits) { return emu::from_bits<float>(bits); }
inline unsigned __float_as_uint(float v) { return unsigned(emu::to_bits(v)); }
inline float __int_as_float(int bits) { return emu::from_bits<float>(uint64_t(uint32_t(bits))); }
inline int __float_as_int(float v) { return int(uint32_t(emu::to_bits(v))); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;
  };
  const Call call{kernel, {static_cast<P>(std::forward<A>(arguments))...}};
  const auto run = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    std::apply(c.kernel, c.arguments);
  };
  const auto list = [](const P&... values) { return std::array{emu::Parameter{&values, sizeof values}...}; };
  const auto parameters = std::apply(list, call.arguments);
  return emu::launch(*config, {reinterpret_cast<const void*>(kernel), run, &call, sizeof call, parameters.data(),
                               parameters.size()});
}
template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
