// Block-causal attention, backward, for what the tensor-core kernels do not take: fp32, rows that 16-byte accesses
// cannot address, and head dimensions above 128. These are the same two kernels as in
// block_causal_attention_backward.cuh, with multiply-adds in fp32. A tile has 32 rows (or keys), and blocks of 16 keys
// (or rows) stream by. A thread has two rows (keys) of the tile, and every eighth element of the block or every eighth
// column.
#pragma once
#include "block_causal_attention_backward.cuh"

namespace var_kernels {
namespace {

constexpr int kPlainTile = 32, kPlainBlock = 16, kPlainWeights = kPlainBlock + 1;
constexpr size_t plain_backward_shared_bytes(int dim) {
  return (2 * (kPlainTile + kPlainBlock) * size_t(plain_pitch(dim)) + kPlainTile * kPlainWeights) * sizeof(float);
}

// Computes log2(p). The product lse·log2(e) is kept as a sum of two numbers: rounded to one number, it would change p
// by 5e-6 where logits are 100. An infinite lse has no second part.
struct PlainExponent {
  float high, low;
  __device__ __forceinline__ explicit PlainExponent(float lse) : high(lse * kLog2E), low(0.0f) {
    if (fabsf(high) != INFINITY) low = fmaf(lse, kLog2E, -high) + lse * kLog2ERest;
  }
  __device__ __forceinline__ float operator()(float score, float scale_log2) const {
    return fmaf(score, scale_log2, -high) - low;
  }
};

// The number of columns that a lane has. Comparing with this one number takes fewer registers than keeping the index of
// each column.
__device__ __forceinline__ int plain_columns(int lane, int dim) { return (dim - lane + 7) / 8; }

// x·yᵀ and z·wᵀ, for a thread's rows `row` and `row` + 1 of tiles x and z, and every eighth row of blocks y and w.
__device__ __forceinline__ void plain_products(float (&xy)[2][2], float (&zw)[2][2], const float* x, const float* z,
                                               const float* y, const float* w, int row, int lane, int dim) {
  const int pitch = plain_pitch(dim);
  for (int d = 0; d < dim; ++d) {
    const float x0 = x[row * pitch + d], x1 = x[(row + 1) * pitch + d];
    const float z0 = z[row * pitch + d], z1 = z[(row + 1) * pitch + d];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float yj = y[(lane + 8 * j) * pitch + d], wj = w[(lane + 8 * j) * pitch + d];
      xy[0][j] = fmaf(x0, yj, xy[0][j]);
      xy[1][j] = fmaf(x1, yj, xy[1][j]);
      zw[0][j] = fmaf(z0, wj, zw[0][j]);
      zw[1][j] = fmaf(z1, wj, zw[1][j]);
    }
  }
}

// acc += weights · block. The lanes of a row hold its weights, and exchange them through the row's line of shared
// memory.
template <int kDim>
__device__ __forceinline__ void plain_accumulate(float (&acc)[2][kDim / 8], const float (&weights)[2][2], float* lines,
                                                 const float* block, int row, int lane, int dim) {
  __syncwarp();  // every lane has read the previous weights
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int j = 0; j < 2; ++j) lines[(row + r) * kPlainWeights + lane + 8 * j] = weights[r][j];
  __syncwarp();
  const int columns = plain_columns(lane, dim);
  constexpr int kAtOnce = kDim < 128 ? kDim / 8 : 16;  // columns: all 32 of kDim 256 would take too many registers
#pragma unroll
  for (int from = 0; from < kDim / 8; from += kAtOnce)
#pragma unroll 1
    for (int i = 0; i < kPlainBlock; ++i) {
      const float w0 = lines[row * kPlainWeights + i], w1 = lines[(row + 1) * kPlainWeights + i];
#pragma unroll
      for (int j = from; j < from + kAtOnce; ++j) {
        const float value = j < columns ? block[i * plain_pitch(dim) + lane + 8 * j] : 0.0f;
        acc[0][j] = fmaf(w0, value, acc[0][j]);
        acc[1][j] = fmaf(w1, value, acc[1][j]);
      }
    }
}

template <class T, int kDim>
__device__ __forceinline__ void plain_store(const float (&acc)[kDim / 8], float factor, T* target, int lane, int dim) {
  const int columns = plain_columns(lane, dim);
#pragma unroll
  for (int j = 0; j < kDim / 8; ++j)
    if (j < columns) target[lane + 8 * j] = from_float<T>(acc[j] * factor);
}

// delta of one row, the same in its eight lanes.
template <class T>
__device__ __forceinline__ float plain_delta(const T* out, const T* dout, bool exists, int lane, int dim) {
  float sum = 0.0f;
  for (int column = lane; exists && column < dim; column += 8)
    sum = fmaf(to_float(out[column]), to_float(dout[column]), sum);
#pragma unroll
  for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
  return sum;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    plain_attention_backward_queries_kernel(const __grid_constant__ GpuAttentionBackward a) {
  VAR_DYN_SMEM(shared);
  const GpuAttentionProblem& p = a.problem;
  const AttentionPlace place = my_place(p);
  const AttentionTile tile = place.tile;
  const int batch = place.pair / p.heads, head = place.pair % p.heads, dim = p.dim, pitch = plain_pitch(dim);
  const int row = int(threadIdx.x) / 8 * 2, lane = int(threadIdx.x) % 8, end = tile.first + tile.count;
  float* const q = reinterpret_cast<float*>(shared);
  float* const dout = q + kPlainTile * pitch;
  float* const keys = dout + kPlainTile * pitch;
  float* const values = keys + kPlainBlock * pitch;
  float* const lines = values + kPlainBlock * pitch;
  load_plain<T, kPlainTile>(q, head_of<const T>(a.q, batch, head), a.q.row, tile.first, end, dim);
  load_plain<T, kPlainTile>(dout, head_of<const T>(a.dout, batch, head), a.dout.row, tile.first, end, dim);

  int visible[2];
  float lse[2], delta[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool exists = row + r < tile.count;
    const int64_t query = tile.first + row + r, index = int64_t(place.pair) * p.queries + query;
    visible[r] = visible_keys(p, tile, row + r);
    lse[r] = exists ? a.lse[index] : INFINITY;
    delta[r] = plain_delta(head_of<const T>(a.out, batch, head) + query * a.out.row,
                           head_of<const T>(a.dout, batch, head) + query * a.dout.row, exists, lane, dim);
    if (exists && a.dlse != nullptr) delta[r] -= a.dlse[index];
    if (exists && lane == 0) a.delta[index] = delta[r];
  }
  const PlainExponent exponent[2] = {PlainExponent(lse[0]), PlainExponent(lse[1])};
  float acc[2][kDim / 8] = {};
  for (int first = 0; first < tile.limit; first += kPlainBlock) {
    __syncthreads();
    load_plain<T, kPlainBlock>(keys, head_of<const T>(a.k, batch, head / p.group), a.k.row, first, tile.limit, dim);
    load_plain<T, kPlainBlock>(values, head_of<const T>(a.v, batch, head / p.group), a.v.row, first, tile.limit, dim);
    __syncthreads();
    float s[2][2] = {}, ds[2][2] = {};
    plain_products(s, ds, q, dout, keys, values, row, lane, dim);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float e = first + lane + 8 * j < visible[r] ? exponent[r](s[r][j], a.scale_log2) : -INFINITY;
        ds[r][j] = exp2f(e) * (ds[r][j] - delta[r]);
      }
    plain_accumulate<kDim>(acc, ds, lines, keys, row, lane, dim);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (row + r < tile.count)
      plain_store<T, kDim>(acc[r], a.softmax_scale,
                           head_of<T>(a.dq, batch, head) + int64_t(tile.first + row + r) * a.dq.row, lane, dim);
}

template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    plain_attention_backward_keys_kernel(const __grid_constant__ GpuAttentionBackward a) {
  VAR_DYN_SMEM(shared);
  const GpuAttentionProblem& p = a.problem;
  const AttentionPlace place = my_place(p);
  const AttentionTile tile = place.tile;
  const int batch = place.pair / p.heads, kv_head = place.pair % p.heads, dim = p.dim, pitch = plain_pitch(dim);
  const int row = int(threadIdx.x) / 8 * 2, lane = int(threadIdx.x) % 8, end = tile.first + tile.count;
  float* const k = reinterpret_cast<float*>(shared);
  float* const v = k + kPlainTile * pitch;
  float* const queries = v + kPlainTile * pitch;
  float* const douts = queries + kPlainBlock * pitch;
  float* const lines = douts + kPlainBlock * pitch;
  load_plain<T, kPlainTile>(k, head_of<const T>(a.k, batch, kv_head), a.k.row, tile.first, end, dim);
  load_plain<T, kPlainTile>(v, head_of<const T>(a.v, batch, kv_head), a.v.row, tile.first, end, dim);

  float dk[2][kDim / 8] = {}, dv[2][kDim / 8] = {};
  for (int head = kv_head * p.group; head < (kv_head + 1) * p.group; ++head) {
    const int64_t statistics = (int64_t(batch) * p.heads * p.group + head) * p.queries;
    for (int first = tile.limit; first < p.queries; first += kPlainBlock) {
      __syncthreads();
      load_plain<T, kPlainBlock>(queries, head_of<const T>(a.q, batch, head), a.q.row, first, p.queries, dim);
      load_plain<T, kPlainBlock>(douts, head_of<const T>(a.dout, batch, head), a.dout.row, first, p.queries, dim);
      __syncthreads();
      float weights[2][2] = {}, ds[2][2] = {};
      plain_products(weights, ds, k, v, queries, douts, row, lane, dim);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int query = first + lane + 8 * j;
        const bool exists = query < p.queries;
        const PlainExponent exponent(exists ? a.lse[statistics + query] : INFINITY);
        const float delta = exists ? a.delta[statistics + query] : 0.0f;
        const int visible = exists ? visible_keys(p.schedule, p.q_offset + query) : 0;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const bool sees = tile.first + row + r < visible;
          weights[r][j] = exp2f(sees ? exponent(weights[r][j], a.scale_log2) : -INFINITY);
          ds[r][j] = weights[r][j] * (ds[r][j] - delta);
        }
      }
      plain_accumulate<kDim>(dv, weights, lines, douts, row, lane, dim);
      plain_accumulate<kDim>(dk, ds, lines, queries, row, lane, dim);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row + r >= tile.count) continue;
    const int64_t target = tile.first + row + r;
    plain_store<T, kDim>(dk[r], a.softmax_scale, head_of<T>(a.dk, batch, kv_head) + target * a.dk.row, lane, dim);
    plain_store<T, kDim>(dv[r], 1.0f, head_of<T>(a.dv, batch, kv_head) + target * a.dv.row, lane, dim);
  }
}

}  // namespace
}  // namespace var_kernels
