// Modulated LayerNorm, y = (x - mean)·rstd·(1 + scale) + shift. The gated form adds a gated residual sum before it.
//
// Memory bandwidth is the limit. With N = B·L·C elements, forward has to move 2 N (x in, y out), and 4 N in the gated
// form; backward has to move 3 N (dy, x in, dx out), and 6 N in the gated form. These kernels move no more than that: a
// row is read once, 16 bytes at a time, and stays in registers between the passes over it. So the plain two-pass
// variance (the mean first, then the squares of the centred values) costs no traffic, and it is accurate where
// E[x²] - E[x]² would cancel.
//
// A worker is the group of threads that share a row: one warp, or a block of up to 16 warps. It works on consecutive
// tokens of one sample, so it reads the modulation of the sample once and, in backward, sums its gradient in registers.
// Each worker then writes one row of fp32 partial sums, and a second kernel adds these in a fixed order. The number of
// workers depends on the shape alone, not on the GPU, so gradients have the same bits on every GPU.
//
// Some rows go to plain kernels, which read a row again for each pass: rows whose 16-byte accesses would be misaligned
// (C is no multiple of 4 or 8, or strides are odd), and rows that are too long for the registers (more than 8192
// channels in forward, 4096 in backward).
#pragma once
#include <type_traits>

#include "../rows.h"
#include "device.cuh"

namespace var_kernels {
namespace {

constexpr int kMaxThreads = 512;  // per worker; this leaves each thread 128 registers on every architecture
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kPlainThreads = 256;

// ---- what a worker does -------------------------------------------------------------------------------------------

struct Partition {
  int samples, length;
  int workers;  // per sample
};

struct Work {
  int worker, sample, begin, end;  // tokens [begin, end) of the sample
};

__device__ __forceinline__ Work my_work(const Partition& partition) {
  const int worker = int(blockIdx.x * blockDim.y + threadIdx.y);
  const int sample = worker / partition.workers, part = worker % partition.workers;
  if (sample >= partition.samples) return {worker, 0, 0, 0};
  return {worker, sample, int(int64_t(partition.length) * part / partition.workers),
          int(int64_t(partition.length) * (part + 1) / partition.workers)};
}

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& rows, int sample, int token) {
  return static_cast<const T*>(rows.data) + sample * rows.per_sample + token * rows.per_token;
}

// Sums over the worker's threads; every thread gets the same result. Two buffers are used in turn: a thread can be one
// sum ahead of the slowest thread of its worker, but not two, so one barrier per sum is enough.
template <int N>
__device__ __forceinline__ void sum_over_row(float (&v)[N], float (*exchange)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = warp_sum(v[i]);
  if (blockDim.x == 32) return;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) exchange[threadIdx.x / 32][i] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = 0.0f;
  for (int warp = 0; warp < blockDim.x / 32; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += exchange[warp][i];
  }
}

// ---- a row in registers: kPacks packs of 16 bytes per thread -------------------------------------------------------

__device__ __forceinline__ int column(int pack, int width) {
  return (int(threadIdx.x) + pack * int(blockDim.x)) * width;
}

// Loads a row. Missing columns are zero, and so is a missing row. A pack of 8 bytes of 16-bit elements goes with a pack
// of 16 bytes of fp32.
template <class T, class Pack, int kPacks>
__device__ __forceinline__ void load_row(Pack (&packs)[kPacks], const Rows& rows, int sample, int token,
                                         int channels) {
  const T* row = row_of<T>(rows, sample, token);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = column(i, sizeof(Pack) / sizeof(T));
    const bool exists = c < channels && rows.data != nullptr;
    if constexpr (sizeof(Pack) == 16)
      packs[i] = exists ? ptx::load16(row + c) : make_uint4(0, 0, 0, 0);
    else
      packs[i] = exists ? ptx::load8(row + c) : make_uint2(0, 0);
  }
}

// Pack i of a dense row.
template <class T, int kWidth>
__device__ __forceinline__ void store_pack(void* out, int row, int i, const float (&v)[kWidth], int channels) {
  const int c = column(i, kWidth);
  if (c >= channels) return;
  T* p = static_cast<T*>(out) + int64_t(row) * channels + c;
  if constexpr (sizeof(T) * kWidth == 16)
    ptx::store16(p, pack<T>(v));
  else
    ptx::store8(p, pack_half<T>(v));
}

// ---- forward ------------------------------------------------------------------------------------------------------

struct Forward {
  Rows x, branch, gate, scale, shift;  // (B, L, C) or broadcast; branch and gate in the gated form only
  void *residual, *y;                  // (B, L, C) dense; y in the dtype of branch
  float *mean, *rstd;                  // (B, L) dense
  Partition partition;
  int channels;
  float eps;
};

__device__ __forceinline__ void store_statistics(const Forward& a, int row, float mean, float rstd) {
  if (threadIdx.x != 0) return;
  a.mean[row] = mean;
  a.rstd[row] = rstd;
}

// residual = x + gate·branch, rounded to T, because that is what is stored: the LayerNorm is taken of the rounded sum.
template <class T, class Branch, class BranchPack, int kPacks>
__device__ __forceinline__ void add_branch(uint4 (&x)[kPacks], const BranchPack (&branch)[kPacks],
                                           const uint4 (&gate)[kPacks], void* residual, int row, int channels) {
  constexpr int kWidth = kPackWidth<T>;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    float v[kWidth], b[kWidth], g[kWidth];
    unpack<T>(x[i], v);
    unpack<Branch>(branch[i], b);
    unpack<T>(gate[i], g);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v[j] += g[j] * b[j];
    x[i] = pack<T>(v);
    const int c = column(i, kWidth);
    if (c < channels) ptx::store16(static_cast<T*>(residual) + int64_t(row) * channels + c, x[i]);
  }
}

// Branch: the type of branch and y. It is T, or a type of half its size.
template <class T, bool kGated, int kPacks, class Branch = T>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(Forward a) {
  constexpr int kWidth = kPackWidth<T>;
  __shared__ float exchange[2][kMaxWarps][1];
  const Work work = my_work(a.partition);
  uint4 scale[kPacks], shift[kPacks], gate[kPacks];
  for (int token = work.begin; token < work.end; ++token) {
    const int row = work.sample * a.partition.length + token;
    const bool first = token == work.begin;
    uint4 x[kPacks];
    load_row<T>(x, a.x, work.sample, token, a.channels);
    if constexpr (kGated) {
      std::conditional_t<sizeof(Branch) == sizeof(T), uint4, uint2> branch[kPacks];
      load_row<Branch>(branch, a.branch, work.sample, token, a.channels);
      if (first || a.gate.per_token != 0) load_row<T>(gate, a.gate, work.sample, token, a.channels);
      add_branch<T, Branch>(x, branch, gate, a.residual, row, a.channels);
    }
    if (first || a.scale.per_token != 0) load_row<T>(scale, a.scale, work.sample, token, a.channels);
    if (first || a.shift.per_token != 0) load_row<T>(shift, a.shift, work.sample, token, a.channels);

    float sum[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kWidth];
      unpack<T>(x[i], v);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[0] += v[j];
    }
    sum_over_row(sum, exchange[0]);
    const float mean = sum[0] / float(a.channels);
    sum[0] = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kWidth];
      unpack<T>(x[i], v);
      const bool exists = column(i, kWidth) < a.channels;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[0] += exists ? (v[j] - mean) * (v[j] - mean) : 0.0f;
    }
    sum_over_row(sum, exchange[1]);
    const float rstd = 1.0f / sqrtf(sum[0] / float(a.channels) + a.eps);
    store_statistics(a, row, mean, rstd);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float v[kWidth], s[kWidth], t[kWidth];
      unpack<T>(x[i], v);
      unpack<T>(scale[i], s);
      unpack<T>(shift[i], t);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[j] = (v[j] - mean) * rstd * (1.0f + s[j]) + t[j];
      store_pack<Branch>(a.y, row, i, v, a.channels);
    }
  }
}

// Takes any strides and any C. Each pass reads the row again; the caches hold it by then.
template <class T, bool kGated, class Branch = T>
__global__ void __launch_bounds__(kPlainThreads, 1) plain_forward_kernel(Forward a) {
  __shared__ float exchange[2][kMaxWarps][1];
  const Work work = my_work(a.partition);
  const int channels = a.channels, step = int(blockDim.x);
  for (int token = work.begin; token < work.end; ++token) {
    const int row = work.sample * a.partition.length + token;
    const T* x = row_of<T>(a.x, work.sample, token);
    const T* scale = row_of<T>(a.scale, work.sample, token);
    const T* shift = row_of<T>(a.shift, work.sample, token);
    Branch* y = static_cast<Branch*>(a.y) + int64_t(row) * channels;
    float sum[1] = {0.0f};
    if constexpr (kGated) {
      const Branch* branch = row_of<Branch>(a.branch, work.sample, token);
      const T* gate = row_of<T>(a.gate, work.sample, token);
      T* residual = static_cast<T*>(a.residual) + int64_t(row) * channels;
      for (int c = int(threadIdx.x); c < channels; c += step)
        residual[c] = from_float<T>(to_float(x[c]) + to_float(gate[c]) * to_float(branch[c]));
      x = residual;  // no barrier: each thread reads only what it has written itself
    }
    for (int c = int(threadIdx.x); c < channels; c += step) sum[0] += to_float(x[c]);
    sum_over_row(sum, exchange[0]);
    const float mean = sum[0] / float(channels);
    sum[0] = 0.0f;
    for (int c = int(threadIdx.x); c < channels; c += step) {
      const float centred = to_float(x[c]) - mean;
      sum[0] += centred * centred;
    }
    sum_over_row(sum, exchange[1]);
    const float rstd = 1.0f / sqrtf(sum[0] / float(channels) + a.eps);
    store_statistics(a, row, mean, rstd);
    for (int c = int(threadIdx.x); c < channels; c += step)
      y[c] = from_float<Branch>((to_float(x[c]) - mean) * rstd * (1.0f + to_float(scale[c])) + to_float(shift[c]));
  }
}

}  // namespace
}  // namespace var_kernels
