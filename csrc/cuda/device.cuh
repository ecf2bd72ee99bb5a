// What kernels share on the device: wrappers of the PTX instructions that CUDA C++ has no function for, and 16-byte
// packs of elements.
//
// The instructions are those of compute capability 8.0, which GPUs of 8.0 ... 12.x execute. Kernels contain no assembly
// of their own, and take dynamic shared memory through VAR_DYN_SMEM. So the wrappers and that macro are all that
// another executor has to replace (the emulation on a CPU, under VAR_EMULATE), and this is the only file that knows
// about it.
#pragma once
#ifndef VAR_EMULATE
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace var_kernels {

using bf16 = __nv_bfloat16;
using fp16 = __half;

constexpr unsigned kFullWarp = 0xffffffffu;

#ifdef VAR_EMULATE
#define VAR_DYN_SMEM(name) unsigned char* const name = ::emu::dynamic_shared()
namespace ptx = ::emu::ptx;
#else
#define VAR_DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]

namespace ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Loads 16 bytes of global memory that nothing writes while the kernel runs.
__device__ __forceinline__ uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
// Loads 8 bytes of such memory.
__device__ __forceinline__ uint2 load8(const void* p) { return __ldg(static_cast<const uint2*>(p)); }
__device__ __forceinline__ void store8(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }

// Loads four 8×8 matrices of 16-bit elements. Lane 8i + j gives the address of row j of matrix i, aligned to 16 bytes.
// Lane 4r + c receives elements (r, 2c) and (r, 2c + 1) of each matrix; in the transposed form (2c, r) and (2c + 1, r).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// d (16×8, fp32) += a (16×16) · b (16×8). With g = lane / 4 and t = lane % 4, a lane has these pairs of elements, named
// by the first one, the second one being in the next column (of b: in the next row): a[0] (g, 2t),
// a[1] (g + 8, 2t), a[2] (g, 2t + 8), a[3] (g + 8, 2t + 8); b0 (2t, g), b1 (2t + 8, g); d[0..1] (g, 2t),
// d[2..3] (g + 8, 2t).
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define VAR_MMA(T, name)                                                                                         \
  template <>                                                                                                    \
  __device__ __forceinline__ void mma_m16n8k16<T>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                          \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                    \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                \
  }
VAR_MMA(bf16, "bf16")
VAR_MMA(fp16, "f16")
#undef VAR_MMA

// x rounded to TF32, an fp32 number with 10 bits of fraction; the 13 bits below them are not specified.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
// d (16×8, fp32) += a (16×8) · b (8×8) in TF32. A lane has single elements of a and b: a[0] (g, t), a[1] (g + 8, t),
// a[2] (g, t + 4), a[3] (g + 8, t + 4); b0 (t, g), b1 (t + 4, g); d as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts an asynchronous copy of 16 bytes from global to shared memory. If `valid` is false, zeros are written and
// `src` is not read. wait<N> waits until at most the N youngest committed groups are in flight; then the calling thread
// can read what the other groups copied, and after a barrier the other threads can.
__device__ __forceinline__ void cp_async16(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(dst)), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x with an error of at most 2 units in the last place. Subnormal results become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace ptx
#endif

// ---- elements and packs of 16 bytes -------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float v) { return __float2half_rn(v); }

// Two elements in one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  const __nv_bfloat162_raw v = __floats2bfloat162_rn(low, high);
  return uint32_t(v.x) | uint32_t(v.y) << 16;
}
template <>
__device__ __forceinline__ uint32_t pack2<fp16>(float low, float high) {
  const __half2_raw v = __floats2half2_rn(low, high);
  return uint32_t(v.x) | uint32_t(v.y) << 16;
}

template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t pair) {
  return __bfloat1622float2(__nv_bfloat162_raw{uint16_t(pair), uint16_t(pair >> 16)});
}
template <>
__device__ __forceinline__ float2 unpack2<fp16>(uint32_t pair) {
  return __half22float2(__half2_raw{uint16_t(pair), uint16_t(pair >> 16)});
}

template <class T>
constexpr int kPackWidth = 16 / sizeof(T);  // elements in 16 bytes

template <class T>
__device__ __forceinline__ void unpack(uint4 pack, float (&v)[kPackWidth<T>]) {
  const uint32_t words[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      v[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack2<T>(words[i]);
      v[2 * i] = pair.x;
      v[2 * i + 1] = pair.y;
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&v)[kPackWidth<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      words[i] = __float_as_uint(v[i]);
    else
      words[i] = pack2<T>(v[2 * i], v[2 * i + 1]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Four elements of 16 bits: they go with a pack of four fp32 elements.
template <class T>
__device__ __forceinline__ void unpack(uint2 pack, float (&v)[4]) {
  const float2 low = unpack2<T>(pack.x), high = unpack2<T>(pack.y);
  v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}

template <class T>
__device__ __forceinline__ uint2 pack_half(const float (&v)[4]) {
  return make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kFullWarp, v, distance);
  return v;
}

}  // namespace var_kernels
