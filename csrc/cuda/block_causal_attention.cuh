// Block-causal attention, forward: FlashAttention over the tiles of a staircase (block_causal_attention_tiles.h).
//
// Let c = softmax_scale·log2(e). All sums are in fp32. For each tile of query rows, a thread block walks over the
// blocks of keys that the tile sees. For each row it keeps the maximum m of the scaled scores so far, the sum l of the
// exponentials, and the sum of the weighted values. When the maximum grows, the older sums are rescaled:
//   s = c·q kᵀ    m' = max(m, rowmax(s))    p = exp2(s - m')    l = l·exp2(m - m') + rowsum(p)
//   acc = acc·exp2(m - m') + p v            out = acc / l       lse = ln(2)·(m + log2(l))
//
// 16-bit tensors use tensor cores: a step is 64 rows by 64 keys, and four warps have 16 rows each. q stays in
// registers; k and v have two stages each in shared memory, and while one stage is multiplied the next is copied.
// Blocks of keys that all rows see are handled by a loop of their own, without predicates. If there are too few tiles
// to fill the GPU, the keys of each tile are divided among several thread blocks (block_causal_attention_parts.cuh).
//
// The sums of a row have a fixed order, so results do not depend on timing. They do depend on the GPU's number of
// multiprocessors, because the number of parts follows from it and from the number of tiles.
//
// fp32 tensors, rows that 16-byte accesses cannot address, and head dimensions above 128 go to a plain kernel of fp32
// multiply-adds. If TF32 is allowed, fp32 tensors use tensor cores as well (block_causal_attention_tf32.cuh).
#pragma once
#include "block_causal_attention_device.cuh"

namespace var_kernels {
namespace {

struct GpuAttentionForward {
  GpuHeadRows q, k, v, out;
  float* lse;  // (B, H, Lq) dense
  float scale_log2;   // > 0
  uint32_t sign;      // the sign bits of two elements of q if the softmax scale is negative, else 0
  GpuAttentionProblem problem;
};
static_assert(sizeof(GpuAttentionForward) <= 4096);

// ---- tensor cores -------------------------------------------------------------------------------------------------

constexpr int kForwardRows = 64, kForwardKeys = 64;

// A thread's share of its warp's 16 rows: rows lane / 4 and lane / 4 + 8.
template <int kDim>
struct SoftmaxRows {
  float acc[kDim / 8][4];
  float peak[2], total[2];  // m, and this thread's part of l
};

template <int kDim, int kTiles>  // of eight keys
__device__ __forceinline__ void softmax_step(float (&s)[kTiles][4], SoftmaxRows<kDim>& rows, float scale_log2) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = -INFINITY;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
    const float peak = fmaxf(rows.peak[half], most * scale_log2), shift = finite_shift(peak);
    const float factor = ptx::exp2_approx(rows.peak[half] - shift);
    rows.peak[half] = peak;
    rows.total[half] *= factor;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      rows.acc[n][2 * half] *= factor;
      rows.acc[n][2 * half + 1] *= factor;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[n][i] = ptx::exp2_approx(fmaf(s[n][i], scale_log2, -shift));
        rows.total[half] += s[n][i];
      }
  }
}

// Sets the scores of invisible keys to -inf. The keys begin at `first`; each of the thread's two rows sees `visible`.
template <int kTiles>
__device__ __forceinline__ void hide(float (&s)[kTiles][4], int first, const int (&visible)[2]) {
  first += int(threadIdx.x) % 4 * 2;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + n * 8 + i % 2 >= visible[i / 2]) s[n][i] = -INFINITY;
}

// Gives each thread of a row the `total` of the whole row.
template <int kDim>
__device__ __forceinline__ void sum_totals(SoftmaxRows<kDim>& rows) {
#pragma unroll
  for (float& total : rows.total) {
    total += __shfl_xor_sync(kFullWarp, total, 1);
    total += __shfl_xor_sync(kFullWarp, total, 2);
  }
}

// Stores lse of the thread's rows, `row` and `row` + 8 of the tile, and returns 1 / l.
template <int kDim>
__device__ __forceinline__ void store_lse(float (&inverse)[2], const SoftmaxRows<kDim>& rows,
                                          const GpuAttentionForward& a, const AttentionPlace& place, int row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    inverse[half] = 1.0f / rows.total[half];
    if (threadIdx.x % 4 == 0 && row + 8 * half < place.tile.count)
      a.lse[int64_t(place.pair) * a.problem.queries + place.tile.first + row + 8 * half] =
          log_sum_exp(rows.peak[half], rows.total[half]);
  }
}

// The keys and values of one head, and their stages in shared memory. Block b is in stage b % 2.
template <class T, int kDim, int kKeys>
struct KeyStages {
  static constexpr int kTile = kKeys * kDim;
  T *keys, *values;  // two tiles each
  const T *k, *v;
  int64_t k_row, v_row;
  int limit, dim;

  __device__ __forceinline__ T* key_tile(int block) const { return keys + block % 2 * kTile; }
  __device__ __forceinline__ T* value_tile(int block) const { return values + block % 2 * kTile; }
  // Each call starts one group of copies. The group is empty if the block does not exist, so that every step waits for
  // the same number of groups.
  __device__ __forceinline__ void start_keys(int block) const {
    if (block * kKeys < limit)
      start_copy<T, kDim, kKeys>(key_tile(block), k, k_row, block * kKeys, limit, dim);
    ptx::cp_async_commit();
  }
  __device__ __forceinline__ void start_values(int block) const {
    if (block * kKeys < limit)
      start_copy<T, kDim, kKeys>(value_tile(block), v, v_row, block * kKeys, limit, dim);
    ptx::cp_async_commit();
  }
};

// Adds one block of keys. `visible`: how many keys each of the thread's two rows sees; it is used only if kMasked.
template <bool kMasked, class T, int kDim>
__device__ __forceinline__ void attend(SoftmaxRows<kDim>& rows, const uint32_t (&q)[kDim / 16][4],
                                       const KeyStages<T, kDim, kForwardKeys>& stages, int block,
                                       const int (&visible)[2], float scale_log2) {
  float s[kForwardKeys / 8][4] = {};
  ptx::cp_async_wait<1>();  // the keys of this block are here; its values may be in flight
  __syncthreads();          // and every warp is done with the keys of the previous block
  stages.start_keys(block + 1);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k)
    multiply_transposed<T, kDim, kForwardKeys>(s, q[k], stages.key_tile(block), k);
  if constexpr (kMasked) hide(s, block * kForwardKeys, visible);
  softmax_step(s, rows, scale_log2);
  ptx::cp_async_wait<1>();
  __syncthreads();
  stages.start_values(block + 1);
  multiply<T, kDim, kForwardKeys>(rows.acc, s, stages.value_tile(block));
}

constexpr size_t forward_shared_bytes(int dim) { return size_t(4) * kForwardKeys * dim * 2; }

// The number of blocks that a multiprocessor should hold at once, so that one copies while another multiplies.
constexpr int forward_blocks(int dim) { return dim <= 64 ? 3 : 2; }

// The softmax of a tile over the keys from block `begin` to key `limit`, which is the tile's own limit or a multiple of
// kForwardKeys. Afterwards each thread has the `total` of its whole rows.
template <class T, int kDim>
__device__ __forceinline__ void attend_tile(SoftmaxRows<kDim>& rows, const GpuAttentionForward& a,
                                            const AttentionPlace& place, T* keys, int begin, int limit) {
  const GpuAttentionProblem& p = a.problem;
  const AttentionTile tile = place.tile;
  const int batch = place.pair / p.heads, head = place.pair % p.heads;
  const int first_row = int(threadIdx.x) / 32 * 16, row = first_row + int(threadIdx.x) % 32 / 4;

  T* const values = keys + 2 * KeyStages<T, kDim, kForwardKeys>::kTile;
  const KeyStages<T, kDim, kForwardKeys> stages = {
      keys, values, head_of<const T>(a.k, batch, head / p.group), head_of<const T>(a.v, batch, head / p.group),
      a.k.row, a.v.row, limit, p.dim};
  // q is loaded through a stage of values that is not used before the second barrier of the first step.
  T* const q_tile = stages.value_tile(begin + 1);
  static_assert(kForwardRows == kForwardKeys);
  start_copy<T, kDim, kForwardRows>(q_tile, head_of<const T>(a.q, batch, head), a.q.row, tile.first,
                                    tile.first + tile.count, p.dim);
  stages.start_keys(begin);
  stages.start_values(begin);
  const int visible[2] = {visible_keys(p, tile, row), visible_keys(p, tile, row + 8)};
  ptx::cp_async_wait<1>();
  __syncthreads();
  uint32_t q[kDim / 16][4];
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    load_left<T, kDim>(q[k], q_tile, first_row, k);
#pragma unroll
    for (int i = 0; i < 4; ++i) q[k][i] ^= a.sign;
  }

  rows = {{}, {-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  int block = begin;
  for (; block < min(tile.common, limit) / kForwardKeys; ++block)
    attend<false>(rows, q, stages, block, visible, a.scale_log2);
  for (; block * kForwardKeys < limit; ++block) attend<true>(rows, q, stages, block, visible, a.scale_log2);
  sum_totals(rows);
}

template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, forward_blocks(kDim))
    attention_forward_kernel(const __grid_constant__ GpuAttentionForward a) {
  VAR_DYN_SMEM(shared);
  T* const keys = reinterpret_cast<T*>(shared);
  const AttentionPlace place = my_place(a.problem);
  const AttentionTile tile = place.tile;
  SoftmaxRows<kDim> rows;
  attend_tile<T, kDim>(rows, a, place, keys, 0, tile.limit);

  const int first_row = int(threadIdx.x) / 32 * 16;
  float inverse[2];
  store_lse(inverse, rows, a, place, first_row + int(threadIdx.x) % 32 / 4);
  T* const out = head_of<T>(a.out, place.pair / a.problem.heads, place.pair % a.problem.heads);
  // No copy is in flight, and no warp has read keys since the last barrier, so their memory can be reused.
  store_rows<T, kDim>(rows.acc, inverse, keys, first_row, tile.count, out + tile.first * a.out.row, a.out.row,
                      a.problem.dim);
}

// ---- plain --------------------------------------------------------------------------------------------------------

// A step is 32 rows by 32 keys: a thread has 2 rows, and every eighth key or column.
constexpr int kPlainRows = 32, kPlainKeys = 32;

// The pitch of fp32 rows in shared memory. It is odd, so that one column of eight rows lies in eight banks.
__host__ __device__ constexpr int plain_pitch(int dim) { return dim | 1; }
constexpr size_t plain_forward_shared_bytes(int dim) {
  return ((kPlainRows + kPlainKeys) * size_t(plain_pitch(dim)) + kPlainRows * (kPlainKeys + 1)) * sizeof(float);
}

// Loads rows [first, first + kRows) of a head, times `factor`. Rows from `limit` on are zero.
template <class T, int kRows>
__device__ __forceinline__ void load_plain(float* tile, const T* head, int64_t row_stride, int first, int limit,
                                           int dim, float factor = 1.0f) {
#pragma unroll 1  // unrolled, the addresses would take registers that the sums need
  for (int index = int(threadIdx.x); index < kRows * dim; index += kAttentionThreads) {
    const int row = index / dim, column = index % dim;
    tile[row * plain_pitch(dim) + column] =
        first + row < limit ? to_float(head[(first + row) * row_stride + column]) * factor : 0.0f;
  }
}

// The softmax of a thread's two rows, whose elements eight neighbouring lanes share. It writes p to `weights`.
template <int kDim>
__device__ __forceinline__ void plain_softmax_step(float (&s)[2][kPlainKeys / 8], float* weights,
                                                   float (&acc)[2][kDim / 8], float (&peak)[2], float (&total)[2],
                                                   float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float most = -INFINITY;
#pragma unroll
    for (int j = 0; j < kPlainKeys / 8; ++j) most = fmaxf(most, s[r][j]);
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, lanes));
    const float new_peak = fmaxf(peak[r], most * scale_log2), shift = finite_shift(new_peak);
    const float factor = exp2f(peak[r] - shift);
    peak[r] = new_peak;
    total[r] *= factor;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) acc[r][j] *= factor;
#pragma unroll
    for (int j = 0; j < kPlainKeys / 8; ++j) {
      const float p = exp2f(fmaf(s[r][j], scale_log2, -shift));
      total[r] += p;
      weights[r * (kPlainKeys + 1) + 8 * j] = p;
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads)
    plain_attention_forward_kernel(const __grid_constant__ GpuAttentionForward a) {
  VAR_DYN_SMEM(shared);
  const GpuAttentionProblem& p = a.problem;
  const AttentionPlace place = my_place(p);
  const AttentionTile tile = place.tile;
  const int batch = place.pair / p.heads, head = place.pair % p.heads, dim = p.dim, pitch = plain_pitch(dim);
  const int row = int(threadIdx.x) / 8 * 2, lane = int(threadIdx.x) % 8;
  float* const q = reinterpret_cast<float*>(shared);
  float* const block = q + kPlainRows * pitch;  // holds a block of keys, then of values
  float* const weights = block + kPlainKeys * pitch;
  load_plain<T, kPlainRows>(q, head_of<const T>(a.q, batch, head), a.q.row, tile.first, tile.first + tile.count, dim,
                            a.sign != 0 ? -1.0f : 1.0f);
  const int visible[2] = {visible_keys(p, tile, row), visible_keys(p, tile, row + 1)};
  float acc[2][kDim / 8] = {}, peak[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int first = 0; first < tile.limit; first += kPlainKeys) {
    __syncthreads();  // every thread is done with the values of the previous block
    load_plain<T, kPlainKeys>(block, head_of<const T>(a.k, batch, head / p.group), a.k.row, first, tile.limit, dim);
    __syncthreads();
    float s[2][kPlainKeys / 8] = {};
    for (int d = 0; d < dim; ++d)
#pragma unroll
      for (int j = 0; j < kPlainKeys / 8; ++j) {
        const float key = block[(lane + 8 * j) * pitch + d];
        s[0][j] = fmaf(q[row * pitch + d], key, s[0][j]);
        s[1][j] = fmaf(q[(row + 1) * pitch + d], key, s[1][j]);
      }
#pragma unroll
    for (int j = 0; j < kPlainKeys / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (first + lane + 8 * j >= visible[r]) s[r][j] = -INFINITY;
    plain_softmax_step<kDim>(s, weights + row * (kPlainKeys + 1) + lane, acc, peak, total, a.scale_log2);
    __syncthreads();
    load_plain<T, kPlainKeys>(block, head_of<const T>(a.v, batch, head / p.group), a.v.row, first, tile.limit, dim);
    __syncthreads();
    for (int key = 0; key < kPlainKeys; ++key) {
      const float p0 = weights[row * (kPlainKeys + 1) + key], p1 = weights[(row + 1) * (kPlainKeys + 1) + key];
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        const int column = lane + 8 * j;
        const float value = column < dim ? block[key * pitch + column] : 0.0f;
        acc[0][j] = fmaf(p0, value, acc[0][j]);
        acc[1][j] = fmaf(p1, value, acc[1][j]);
      }
    }
  }
  T* const out = head_of<T>(a.out, batch, head);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) total[r] += __shfl_xor_sync(kFullWarp, total[r], lanes);
    if (row + r >= tile.count) continue;
    const int64_t query = tile.first + row + r;
    if (lane == 0)
      a.lse[int64_t(place.pair) * p.queries + query] = log_sum_exp(peak[r], total[r]);
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
      if (lane + 8 * j < dim) out[query * a.out.row + lane + 8 * j] = from_float<T>(acc[r][j] / total[r]);
  }
}

// ---- schedules too long for arguments ------------------------------------------------------------------------------

struct ScheduleNumbers {
  int32_t* target;
  int count;
  int32_t numbers[AttentionSchedule::kInline];
};

__global__ void write_schedule_kernel(const __grid_constant__ ScheduleNumbers part) {
  for (int i = int(threadIdx.x); i < part.count; i += int(blockDim.x)) part.target[i] = part.numbers[i];
}

}  // namespace
}  // namespace var_kernels
