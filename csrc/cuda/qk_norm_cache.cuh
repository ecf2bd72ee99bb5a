// Computes unit queries and keys, and the rows of the KV cache, from one packed qkv.
//
// Memory bandwidth is the limit: for each token, 3·H·D elements are read and as many are written. Several lanes share a
// head, and each has 16 bytes of it (twice 16 bytes if D needs them). Query, key and value of the head are all
// requested before the first one is used.
#pragma once
#include "../qk_norm_cache.h"
#include "device.cuh"

namespace var_kernels {

constexpr int kQkNormThreads = 128;

// Where a head of a token comes from and goes to.
template <class T>
struct HeadPlaces {
  const T* in;  // the query; key and value follow at `part` and twice `part`
  int64_t part;
  T *q, *k, *v;

  // The divisions are 32-bit: the entry function checks that there are few enough groups.
  __device__ HeadPlaces(const QkNormCache& a, unsigned group) : part(a.qkv_part) {
    const unsigned row = group / unsigned(a.heads), length = unsigned(a.length);
    const int64_t head = group % unsigned(a.heads), sample = row / length, token = row % length;
    in = static_cast<const T*>(a.qkv) + sample * a.qkv_sample + token * a.qkv_token + head * a.qkv_head;
    q = static_cast<T*>(a.q) + int64_t(group) * a.dim;
    const auto cache_row = [&](const CacheRows& cache) {
      return static_cast<T*>(cache.data) + sample * cache.per_sample + head * cache.per_head +
             (a.start + token) * cache.per_token;
    };
    k = cache_row(a.k);
    v = cache_row(a.v);
  }
};

__device__ __forceinline__ float scale_of(float squares, float factor) {
  const float norm = sqrtf(squares);
  return factor / (norm < 1e-12f ? 1e-12f : norm);  // NaN stays NaN
}

// Each head has `lanes` threads, a power of two. Rows are aligned to 16 bytes and consist of whole packs.
template <class T, int kPacks>
__global__ void __launch_bounds__(kQkNormThreads) qk_norm_cache_kernel(const QkNormCache a, int lanes) {
  constexpr int kWidth = kPackWidth<T>;
  const int lane = int(threadIdx.x) % lanes, packs = int(a.dim) / kWidth;
  const unsigned wanted = blockIdx.x * (kQkNormThreads / unsigned(lanes)) + threadIdx.x / unsigned(lanes);
  const bool present = wanted < a.batch * a.length * a.heads;
  const unsigned group = present ? wanted : 0;
  const HeadPlaces<T> head(a, group);
  uint4 raw[3][kPacks];
#pragma unroll
  for (int part = 0; part < 3; ++part)
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = lane + i * lanes;
      raw[part][i] = present && at < packs ? ptx::load16(head.in + part * head.part + at * kWidth)
                                           : make_uint4(0, 0, 0, 0);
    }
  const float factor = a.q_factor[group % unsigned(a.heads)];
#pragma unroll
  for (int part = 0; part < 3; ++part) {
    T* const out = part == 0 ? head.q : part == 1 ? head.k : head.v;
    if (part < 2) {
      float values[kPacks][kWidth], squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        unpack<T>(raw[part][i], values[i]);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) squares += values[i][j] * values[i][j];
      }
      for (int distance = lanes / 2; distance > 0; distance /= 2)
        squares += __shfl_xor_sync(kFullWarp, squares, distance);
      const float scale = scale_of(squares, part == 0 ? factor : 1.0f);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) values[i][j] *= scale;
        raw[part][i] = pack<T>(values[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int at = lane + i * lanes;
      if (present && at < packs) ptx::store16(out + at * kWidth, raw[part][i]);
    }
  }
}

// A warp for each head, element by element. This takes any dimension and any alignment.
template <class T>
__global__ void __launch_bounds__(kQkNormThreads) plain_qk_norm_cache_kernel(const QkNormCache a) {
  const int lane = int(threadIdx.x) % 32;
  const unsigned group = blockIdx.x * (kQkNormThreads / 32) + threadIdx.x / 32;
  if (group >= a.batch * a.length * a.heads) return;
  const HeadPlaces<T> head(a, group);
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const T* const in = head.in + part * head.part;
    T* const out = part == 0 ? head.q : head.k;
    float squares = 0.0f;
    for (int d = lane; d < a.dim; d += 32) squares += to_float(in[d]) * to_float(in[d]);
    const float scale = scale_of(warp_sum(squares), part == 0 ? a.q_factor[group % unsigned(a.heads)] : 1.0f);
    for (int d = lane; d < a.dim; d += 32) out[d] = from_float<T>(to_float(in[d]) * scale);
  }
  for (int d = lane; d < a.dim; d += 32) head.v[d] = head.in[2 * head.part + d];
}

}  // namespace var_kernels
