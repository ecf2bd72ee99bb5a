// Block-causal attention, backward. It recomputes p = exp(score - lse). With delta = rowsum(dout·out) - dlse, where
// dlse is the gradient of lse, and ds = p·(dout vᵀ - delta):
//   dq = softmax_scale·ds k      dk = softmax_scale·dsᵀ q      dv = pᵀ dout
//
// There are two kernels, without atomics, so that every sum has one order. The first computes dq over tiles of rows,
// and stores delta for the second. The second computes dk and dv over tiles of keys, through all heads that share the
// keys. On tensor cores a tile is 64 rows or keys, 16 for each warp. The other side streams by in blocks of 64, or of
// 32 or 16 where larger head dimensions leave no registers for more.
#pragma once
#include "block_causal_attention.cuh"

namespace var_kernels {
namespace {

struct GpuAttentionBackward {
  GpuHeadRows q, k, v, out, dout, dq, dk, dv;
  const float *lse, *dlse;  // (B, H, Lq) dense; dlse or null
  float* delta;             // (B, H, Lq) dense
  float softmax_scale, scale_log2;
  GpuAttentionProblem problem;
};
static_assert(sizeof(GpuAttentionBackward) <= 4096);

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLog2ERest = 1.925963033500681e-08f;  // log2(e) minus its value in fp32

constexpr int kBackwardTile = 64;
// How many keys or rows stream by at a time.
__host__ __device__ constexpr int backward_keys(int dim) { return dim <= 64 ? 64 : 32; }
__host__ __device__ constexpr int backward_rows(int dim) { return dim <= 64 ? 64 : dim <= 96 ? 32 : 16; }

// ---- dq, row by row, and delta ------------------------------------------------------------------------------------

constexpr size_t backward_queries_shared_bytes(int dim) {
  return size_t(2 * kBackwardTile + 4 * backward_keys(dim)) * dim * 2;
}

// A thread's two rows of a tile.
struct BackwardRows {
  int visible[2];    // how many keys each sees
  float lse[2];      // times log2(e); inf for rows that do not exist, so that their p is 0
  float delta[2];
};

template <bool kMasked, class T, int kDim, int kKeys>
__device__ __forceinline__ void add_dq(float (&acc)[kDim / 8][4], const uint32_t (&q)[kDim / 16][4],
                                       const uint32_t (&dout)[kDim / 16][4], const KeyStages<T, kDim, kKeys>& stages,
                                       int block, const BackwardRows& rows, float scale_log2) {
  float s[kKeys / 8][4] = {}, dp[kKeys / 8][4] = {};
  ptx::cp_async_wait<1>();
  __syncthreads();
  stages.start_keys(block + 1);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) multiply_transposed<T, kDim, kKeys>(s, q[k], stages.key_tile(block), k);
  ptx::cp_async_wait<1>();
  __syncthreads();
  stages.start_values(block + 1);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) multiply_transposed<T, kDim, kKeys>(dp, dout[k], stages.value_tile(block), k);
  const int first = block * kKeys + int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float exponent = fmaf(s[n][i], scale_log2, -rows.lse[i / 2]);
      if (kMasked && first + n * 8 + i % 2 >= rows.visible[i / 2]) exponent = -INFINITY;
      s[n][i] = ptx::exp2_approx(exponent) * (dp[n][i] - rows.delta[i / 2]);
    }
  multiply<T, kDim, kKeys>(acc, s, stages.key_tile(block));
}

// delta without dlse, computed from dout in registers and a tile of out.
template <class T, int kDim>
__device__ __forceinline__ void dot_rows(float (&delta)[2], const uint32_t (&dout)[kDim / 16][4], const T* out_tile,
                                         int first_row) {
  delta[0] = delta[1] = 0.0f;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t out[4];
    load_left<T, kDim>(out, out_tile, first_row, k);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack2<T>(dout[k][i]), y = unpack2<T>(out[i]);
      delta[i % 2] = fmaf(x.x, y.x, fmaf(x.y, y.y, delta[i % 2]));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    delta[half] += __shfl_xor_sync(kFullWarp, delta[half], 1);
    delta[half] += __shfl_xor_sync(kFullWarp, delta[half], 2);
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_queries_kernel(const __grid_constant__ GpuAttentionBackward a) {
  VAR_DYN_SMEM(shared);
  constexpr int kKeys = backward_keys(kDim);
  static_assert(2 * kKeys >= kBackwardTile);
  const GpuAttentionProblem& p = a.problem;
  const AttentionPlace place = my_place(p);
  const AttentionTile tile = place.tile;
  const int batch = place.pair / p.heads, head = place.pair % p.heads;
  const int first_row = int(threadIdx.x) / 32 * 16, row = first_row + int(threadIdx.x) % 32 / 4;

  T* const q_tile = reinterpret_cast<T*>(shared);
  T* const dout_tile = q_tile + kBackwardTile * kDim;
  T* const keys = dout_tile + kBackwardTile * kDim;
  T* const values = keys + 2 * kKeys * kDim;
  const KeyStages<T, kDim, kKeys> stages = {
      keys, values, head_of<const T>(a.k, batch, head / p.group), head_of<const T>(a.v, batch, head / p.group),
      a.k.row, a.v.row, tile.limit, p.dim};
  const int end = tile.first + tile.count;
  start_copy<T, kDim, kBackwardTile>(q_tile, head_of<const T>(a.q, batch, head), a.q.row, tile.first, end, p.dim);
  start_copy<T, kDim, kBackwardTile>(dout_tile, head_of<const T>(a.dout, batch, head), a.dout.row, tile.first, end,
                                     p.dim);
  // The memory of the values holds out first, which is needed once, before the values are loaded.
  start_copy<T, kDim, kBackwardTile>(values, head_of<const T>(a.out, batch, head), a.out.row, tile.first, end, p.dim);
  stages.start_keys(0);
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t q[kDim / 16][4], dout[kDim / 16][4];
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    load_left<T, kDim>(q[k], q_tile, first_row, k);
    load_left<T, kDim>(dout[k], dout_tile, first_row, k);
  }
  BackwardRows rows;
  dot_rows<T, kDim>(rows.delta, dout, values, first_row);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + 8 * half;
    rows.visible[half] = visible_keys(p, tile, r);
    rows.lse[half] = INFINITY;
    if (r >= tile.count) continue;
    const int64_t index = int64_t(place.pair) * p.queries + tile.first + r;
    rows.lse[half] = a.lse[index] * kLog2E;
    if (a.dlse != nullptr) rows.delta[half] -= a.dlse[index];
    if (threadIdx.x % 4 == 0) a.delta[index] = rows.delta[half];
  }
  __syncthreads();  // the warps are done with out
  stages.start_values(0);

  float acc[kDim / 8][4] = {};
  int block = 0;
  for (; block < tile.common / kKeys; ++block) add_dq<false>(acc, q, dout, stages, block, rows, a.scale_log2);
  for (; block * kKeys < tile.limit; ++block) add_dq<true>(acc, q, dout, stages, block, rows, a.scale_log2);
  ptx::cp_async_wait<0>();
  // A warp reads only its own rows of q, so no barrier is needed.
  store_rows<T, kDim>(acc, {a.softmax_scale, a.softmax_scale}, q_tile, first_row, tile.count,
                      head_of<T>(a.dq, batch, head) + tile.first * a.dq.row, a.dq.row, p.dim);
}

// ---- dk and dv, key by key ----------------------------------------------------------------------------------------

// Statistics of the rows of a block, in two stages like the block.
template <int kRows>
struct RowStatistics {
  float lse[2][kRows], delta[2][kRows];  // lse times log2(e)
  int visible[2][kRows];
};

constexpr size_t backward_keys_shared_bytes(int dim) {
  const size_t block = backward_rows(dim);
  return (2 * kBackwardTile + 4 * block) * dim * 2 + 6 * block * sizeof(float);
}

// The rows that see a tile of keys, as one sequence of steps: the blocks of the group's first head, then of the next.
template <class T, int kDim>
struct RowStages {
  static constexpr int kRows = backward_rows(kDim), kTile = kRows * kDim;
  const GpuAttentionBackward& a;
  T *queries, *douts;  // two tiles each
  RowStatistics<kRows>& statistics;
  int batch, kv_head, limit, blocks, steps;

  __device__ __forceinline__ T* query_tile(int step) const { return queries + step % 2 * kTile; }
  __device__ __forceinline__ T* dout_tile(int step) const { return douts + step % 2 * kTile; }
  __device__ __forceinline__ int head(int step) const { return kv_head * a.problem.group + step / blocks; }
  __device__ __forceinline__ int first(int step) const { return limit + step % blocks * kRows; }
  __device__ __forceinline__ void start(T* tile, const GpuHeadRows& x, int step) const {
    if (step < steps)
      start_copy<T, kDim, kRows>(tile, head_of<const T>(x, batch, head(step)), x.row, first(step), a.problem.queries,
                                 a.problem.dim);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void start_queries(int step) const { start(query_tile(step), a.q, step); }
  __device__ __forceinline__ void start_dout(int step) const { start(dout_tile(step), a.dout, step); }

  // Each of the first threads loads lse of one row, each of the next threads delta, one step before it is needed.
  __device__ __forceinline__ float load_statistic(int step) const {
    const GpuAttentionProblem& p = a.problem;
    const int t = int(threadIdx.x), row = first(step) + t % kRows;
    if (step >= steps || t >= 2 * kRows) return 0.0f;
    if (row >= p.queries) return t < kRows ? INFINITY : 0.0f;  // p = 0 in rows that do not exist
    const int64_t index = (int64_t(batch) * p.heads * p.group + head(step)) * p.queries + row;
    return t < kRows ? a.lse[index] * kLog2E : a.delta[index];
  }
  __device__ __forceinline__ void store_statistic(int step, float value, bool masked) const {
    const int t = int(threadIdx.x);
    if (t < kRows) {
      statistics.lse[step % 2][t] = value;
      const int row = first(step) + t;
      if (masked)
        statistics.visible[step % 2][t] =
            row < a.problem.queries ? visible_keys(a.problem.schedule, a.problem.q_offset + row) : 0;
    } else if (t < 2 * kRows) {
      statistics.delta[step % 2][t - kRows] = value;
    }
  }
};

template <class T, int kDim>
__device__ __forceinline__ void add_dk_dv(float (&dk)[kDim / 8][4], float (&dv)[kDim / 8][4], const T* k_tile,
                                          const T* v_tile, const RowStages<T, kDim>& stages, int step,
                                          float& statistic, int key, int common, float scale_log2) {
  constexpr int kRows = RowStages<T, kDim>::kRows;
  const int first_row = int(threadIdx.x) / 32 * 16, column = int(threadIdx.x) % 4 * 2;
  const bool masked = stages.first(step) < common;
  float p[kRows / 8][4] = {}, ds[kRows / 8][4] = {};
  ptx::cp_async_wait<1>();
  stages.store_statistic(step, statistic, masked);
  __syncthreads();
  stages.start_queries(step + 1);
  statistic = stages.load_statistic(step + 1);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t left[4];
    load_left<T, kDim>(left, k_tile, first_row, k);
    multiply_transposed<T, kDim, kRows>(p, left, stages.query_tile(step), k);
  }
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = n * 8 + column + i % 2;
      float exponent = fmaf(p[n][i], scale_log2, -stages.statistics.lse[step % 2][row]);
      if (masked && key + i / 2 * 8 >= stages.statistics.visible[step % 2][row]) exponent = -INFINITY;
      p[n][i] = ptx::exp2_approx(exponent);
    }
  ptx::cp_async_wait<1>();
  __syncthreads();
  stages.start_dout(step + 1);
  multiply<T, kDim, kRows>(dv, p, stages.dout_tile(step));
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t left[4];
    load_left<T, kDim>(left, v_tile, first_row, k);
    multiply_transposed<T, kDim, kRows>(ds, left, stages.dout_tile(step), k);
  }
#pragma unroll
  for (int n = 0; n < kRows / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      ds[n][i] = p[n][i] * (ds[n][i] - stages.statistics.delta[step % 2][n * 8 + column + i % 2]);
  multiply<T, kDim, kRows>(dk, ds, stages.query_tile(step));
}

// Here the pairs are those of batch and key head, and `heads` is the number of key heads. Blocks are transposed, (keys,
// rows), because pᵀ and dsᵀ are multiplied by dout and q.
template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, 2)
    attention_backward_keys_kernel(const __grid_constant__ GpuAttentionBackward a) {
  VAR_DYN_SMEM(shared);
  constexpr int kRows = backward_rows(kDim);
  const GpuAttentionProblem& p = a.problem;
  const AttentionPlace place = my_place(p);
  const AttentionTile tile = place.tile;
  const int batch = place.pair / p.heads, head = place.pair % p.heads;
  const int first_row = int(threadIdx.x) / 32 * 16, key = tile.first + first_row + int(threadIdx.x) % 32 / 4;

  T* const k_tile = reinterpret_cast<T*>(shared);
  T* const v_tile = k_tile + kBackwardTile * kDim;
  T* const queries = v_tile + kBackwardTile * kDim;
  T* const douts = queries + 2 * kRows * kDim;
  auto& statistics = *reinterpret_cast<RowStatistics<kRows>*>(douts + 2 * kRows * kDim);
  const int blocks = (p.queries - tile.limit + kRows - 1) / kRows;
  const RowStages<T, kDim> stages = {a, queries, douts, statistics, batch, head, tile.limit, blocks, p.group * blocks};
  float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
  if (blocks > 0) {
    const int end = tile.first + tile.count;
    start_copy<T, kDim, kBackwardTile>(k_tile, head_of<const T>(a.k, batch, head), a.k.row, tile.first, end, p.dim);
    start_copy<T, kDim, kBackwardTile>(v_tile, head_of<const T>(a.v, batch, head), a.v.row, tile.first, end, p.dim);
    stages.start_queries(0);
    stages.start_dout(0);
    float statistic = stages.load_statistic(0);
    for (int step = 0; step < stages.steps; ++step)
      add_dk_dv<T, kDim>(dk, dv, k_tile, v_tile, stages, step, statistic, key, tile.common, a.scale_log2);
    ptx::cp_async_wait<0>();
  }
  // A warp reads only its own rows of k and v, so no barrier is needed.
  store_rows<T, kDim>(dk, {a.softmax_scale, a.softmax_scale}, k_tile, first_row, tile.count,
                      head_of<T>(a.dk, batch, head) + tile.first * a.dk.row, a.dk.row, p.dim);
  store_rows<T, kDim>(dv, {1.0f, 1.0f}, v_tile, first_row, tile.count,
                      head_of<T>(a.dv, batch, head) + tile.first * a.dv.row, a.dv.row, p.dim);
}

}  // namespace
}  // namespace var_kernels
