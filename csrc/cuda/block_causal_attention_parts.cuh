// Block-causal attention of few queries against many keys, as in a step with a key-value cache. There are too few tiles
// of rows to fill a GPU, so the keys of each tile are divided into consecutive parts, one thread block each. For each
// row, a part stores the result of its walk over the keys: the maximum m, the sum l and the unnormalised sum of values.
// A second kernel adds the parts up in their order, rescaled to their common maximum:
//   m = max over parts of m_i    l = sum of l_i·exp2(m_i - m)    out = (sum of acc_i·exp2(m_i - m)) / l
// The walk rescales from block to block by the same formula, so non-finite values give the same results in both.
//
// One kernel whose blocks synchronise would save the second launch, but all blocks of a tile would have to be resident
// at the same time.
#pragma once
#include "block_causal_attention.cuh"

namespace var_kernels {
namespace {

// The results of the parts, in fp32 and dense: (parts, B, H, Lq, D) and (parts, B, H, Lq).
struct AttentionParts {
  int most;            // the largest number of parts of a tile
  float* sums;
  float2* statistics;  // m and l
};
static_assert(sizeof(GpuAttentionForward) + sizeof(AttentionParts) <= 4096);

// A part of fewer than 256 keys takes less time than the second kernel adds. With more than 32 parts, adding them up
// takes the time that they save.
constexpr int kPartBlocks = 4, kMostParts = 32;

// The number of parts that the keys of a tile are divided into.
__host__ __device__ constexpr int parts_of(int limit, int most) {
  const int parts = limit / (kForwardKeys * kPartBlocks);
  return parts < 1 ? 1 : parts < most ? parts : most;
}

// The index of row `row` of a tile, for this part, in the tensors of AttentionParts, without the column.
__device__ __forceinline__ int64_t part_row(const GpuAttentionProblem& p, const AttentionPlace& place, int part,
                                                      int row) {
  return (int64_t(part) * p.pairs + place.pair) * p.queries + place.tile.first + row;
}

template <class T, int kDim>
__global__ void __launch_bounds__(kAttentionThreads, forward_blocks(kDim))
    attention_part_kernel(const __grid_constant__ GpuAttentionForward a, const __grid_constant__ AttentionParts to) {
  VAR_DYN_SMEM(shared);
  const AttentionPlace place = my_place(a.problem);
  const AttentionTile tile = place.tile;
  const int part = int(blockIdx.y), parts = parts_of(tile.limit, to.most);
  if (part >= parts) return;
  const int blocks = (tile.limit + kForwardKeys - 1) / kForwardKeys;
  const int begin = blocks * part / parts, end = blocks * (part + 1) / parts;
  SoftmaxRows<kDim> rows;
  attend_tile<T, kDim>(rows, a, place, reinterpret_cast<T*>(shared), begin, min(end * kForwardKeys, tile.limit));

  const int lane = int(threadIdx.x) % 32, first_row = int(threadIdx.x) / 32 * 16, row = first_row + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    if (lane % 4 == 0 && row + 8 * half < tile.count)
      to.statistics[part_row(a.problem, place, part, row + 8 * half)] =
          make_float2(rows.peak[half], rows.total[half]);
  store_rows<kDim>(rows.acc, {1.0f, 1.0f}, first_row, tile.count,
                   to.sums + part_row(a.problem, place, part, 0) * a.problem.dim, a.problem.dim, a.problem.dim);
}

// The number of blocks that combine a tile's 64 rows. A thread has eight columns of one row.
__host__ __device__ constexpr int combine_blocks(int dim) {
  return (kForwardRows * (dim / 8) + kAttentionThreads - 1) / kAttentionThreads;
}

template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_combine_kernel(const __grid_constant__ GpuAttentionForward a,
                             const __grid_constant__ AttentionParts from) {
  const GpuAttentionProblem& p = a.problem;
  const AttentionPlace place = my_place(p);
  const int chunks = p.dim / 8, index = int(blockIdx.y) * kAttentionThreads + int(threadIdx.x);
  const int row = index / chunks, column = index % chunks * 8, parts = parts_of(place.tile.limit, from.most);
  if (row >= place.tile.count) return;
  float peak = -INFINITY;
  for (int part = 0; part < parts; ++part) peak = fmaxf(peak, from.statistics[part_row(p, place, part, row)].x);
  const float shift = finite_shift(peak);
  float acc[8] = {}, total = 0.0f;
#pragma unroll 2
  for (int part = 0; part < parts; ++part) {
    const int64_t at = part_row(p, place, part, row);
    const float factor = ptx::exp2_approx(from.statistics[at].x - shift);
    total = fmaf(from.statistics[at].y, factor, total);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sums[4];
      unpack<float>(ptx::load16(from.sums + at * p.dim + column + 4 * half), sums);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[4 * half + i] = fmaf(sums[i], factor, acc[4 * half + i]);
    }
  }
  const float inverse = 1.0f / total;
#pragma unroll
  for (float& x : acc) x *= inverse;
  const int query = place.tile.first + row;
  if (column == 0) a.lse[int64_t(place.pair) * p.queries + query] = log_sum_exp(peak, total);
  T* const out = head_of<T>(a.out, place.pair / p.heads, place.pair % p.heads);
  ptx::store16(out + query * a.out.row + column, pack<T>(acc));
}

}  // namespace
}  // namespace var_kernels
