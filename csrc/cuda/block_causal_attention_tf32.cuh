// Block-causal attention of fp32 tensors on tensor cores, forward, used if PyTorch's setting allows TF32.
//
// TF32 keeps 11 bits of an operand, which is too few for the softmax of large scores. Each number is therefore split
// into two, x = big + small with an error of 2^-22 of x, and a product becomes three. The two small ones have sums of
// their own:
//   x·y = big_x·big_y + (small_x·big_y + big_x·small_y)
// This is nearly as accurate as fp32, at less than a third of the rate of TF32. A small sum that is not finite is
// dropped: an infinite operand makes it inf - inf = NaN, while the product of the big parts is what fp32 gives.
//
// Otherwise this is the kernel for 16-bit tensors, but with 64 rows by 32 keys, and with q in shared memory, because in
// registers q would leave none for the sums. It uses 96 KiB of shared memory for 128 columns. Keys are not divided into
// parts. Backward has no such kernel.
#pragma once
#include "block_causal_attention.cuh"

namespace var_kernels {
namespace {

constexpr int kTf32Keys = 32;

struct Tf32Pair {
  uint32_t big, small;
};

__device__ __forceinline__ Tf32Pair split_tf32(float x) {
  const uint32_t big = ptx::to_tf32(x) & 0xffffe000u;
  return {big, ptx::to_tf32(x - __uint_as_float(big))};
}

// A left operand of 16 by 8.
struct Tf32Left {
  uint32_t big[4], small[4];
};

__device__ __forceinline__ Tf32Left split_tf32(float x0, float x1, float x2, float x3) {
  const Tf32Pair pairs[4] = {split_tf32(x0), split_tf32(x1), split_tf32(x2), split_tf32(x3)};
  return {{pairs[0].big, pairs[1].big, pairs[2].big, pairs[3].big},
          {pairs[0].small, pairs[1].small, pairs[2].small, pairs[3].small}};
}

// sum + rest += a·b
__device__ __forceinline__ void multiply_split(float (&sum)[4], float (&rest)[4], const Tf32Left& a, float b0,
                                               float b1) {
  const Tf32Pair x = split_tf32(b0), y = split_tf32(b1);
  ptx::mma_m16n8k8_tf32(rest, a.small, x.big, y.big);
  ptx::mma_m16n8k8_tf32(rest, a.big, x.small, y.small);
  ptx::mma_m16n8k8_tf32(sum, a.big, x.big, y.big);
}

__device__ __forceinline__ void add_finite(float (&sum)[4], const float (&rest)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] += fabsf(rest[i]) < INFINITY ? rest[i] : 0.0f;
}

// Computes swizzled(row, chunk + constant). Of the addresses for the different constants, all but four are a constant
// distance from another one, which leaves registers for the sums.
template <int kDim>
__device__ __forceinline__ int swizzled_from(int row, int chunk, int constant) {
  return swizzled<float, kDim>(row, chunk + constant % 8) + constant / 8 * 8 * kPackWidth<float>;
}

// s (16, kTf32Keys) = q · tileᵀ, with 16 rows of q from `first_row` on, whose bits `sign` are flipped.
template <int kDim>
__device__ __forceinline__ void multiply_keys(float (&s)[kTf32Keys / 8][4], const float* q, int first_row,
                                              uint32_t sign, const float* tile) {
  const int lane = int(threadIdx.x) % 32, row = lane / 16 * 8 + lane % 8;
  float rest[kTf32Keys / 8][4] = {};
#pragma unroll
  for (int k = 0; k < kDim / 8; ++k) {
    uint32_t x[4];  // ldmatrix moves 16-bit elements; two of them are one fp32 element
    ptx::ldmatrix_x4(x, q + swizzled_from<kDim>(first_row + lane % 16, lane / 16, 2 * k));
    const Tf32Left a = split_tf32(__uint_as_float(x[0] ^ sign), __uint_as_float(x[1] ^ sign),
                                  __uint_as_float(x[2] ^ sign), __uint_as_float(x[3] ^ sign));
#pragma unroll
    for (int n = 0; n < kTf32Keys / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, tile + n * 16 * kDim + swizzled_from<kDim>(row, lane / 8 % 2, 2 * k));
      multiply_split(s[2 * n], rest[2 * n], a, __uint_as_float(b[0]), __uint_as_float(b[1]));
      multiply_split(s[2 * n + 1], rest[2 * n + 1], a, __uint_as_float(b[2]), __uint_as_float(b[3]));
    }
  }
#pragma unroll
  for (int n = 0; n < kTf32Keys / 8; ++n) add_finite(s[n], rest[n]);
}

// acc (16, kDim) += p (16, kTf32Keys) · a tile. Of eight keys of p, a thread has columns 2t and 2t + 1, but a left
// operand needs t and t + 4. So the keys are taken in a permuted order, which is the same in p and in the tile.
template <int kDim>
__device__ __forceinline__ void multiply_values(float (&acc)[kDim / 8][4], const float (&p)[kTf32Keys / 8][4],
                                                const float* tile) {
  const int lane = int(threadIdx.x) % 32, row = lane % 4 * 2, column = lane / 4;
  Tf32Left a[kTf32Keys / 8];
#pragma unroll
  for (int k = 0; k < kTf32Keys / 8; ++k) a[k] = split_tf32(p[k][0], p[k][2], p[k][1], p[k][3]);
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    const float* const even = tile + swizzled_from<kDim>(row, column / 4, 2 * n) + column % 4;
    const float* const odd = tile + swizzled_from<kDim>(row + 1, column / 4, 2 * n) + column % 4;
    float rest[4] = {};
#pragma unroll
    for (int k = 0; k < kTf32Keys / 8; ++k) multiply_split(acc[n], rest, a[k], even[k * 8 * kDim], odd[k * 8 * kDim]);
    add_finite(acc[n], rest);
  }
}

template <bool kMasked, int kDim>
__device__ __forceinline__ void attend_tf32(SoftmaxRows<kDim>& rows, const float* q, int first_row, uint32_t sign,
                                            const KeyStages<float, kDim, kTf32Keys>& stages, int block,
                                            const int (&visible)[2], float scale_log2) {
  float s[kTf32Keys / 8][4] = {};
  ptx::cp_async_wait<1>();  // the keys of this block and q are here; its values may be in flight
  __syncthreads();          // and every warp is done with the keys of the previous block
  stages.start_keys(block + 1);
  multiply_keys<kDim>(s, q, first_row, sign, stages.key_tile(block));
  if constexpr (kMasked) hide(s, block * kTf32Keys, visible);
  softmax_step(s, rows, scale_log2);
  ptx::cp_async_wait<1>();
  __syncthreads();
  stages.start_values(block + 1);
  multiply_values<kDim>(rows.acc, s, stages.value_tile(block));
}

constexpr size_t tf32_forward_shared_bytes(int dim) {
  return size_t(kForwardRows + 4 * kTf32Keys) * dim * sizeof(float);
}

template <int kDim>
__global__ void __launch_bounds__(kAttentionThreads, forward_blocks(kDim))
    tf32_attention_forward_kernel(const __grid_constant__ GpuAttentionForward a) {
  VAR_DYN_SMEM(shared);
  const GpuAttentionProblem& p = a.problem;
  const AttentionPlace place = my_place(p);
  const AttentionTile tile = place.tile;
  const int batch = place.pair / p.heads, head = place.pair % p.heads;
  const int first_row = int(threadIdx.x) / 32 * 16, row = first_row + int(threadIdx.x) % 32 / 4;

  float* const q = reinterpret_cast<float*>(shared);
  float* const keys = q + kForwardRows * kDim;
  float* const values = keys + 2 * KeyStages<float, kDim, kTf32Keys>::kTile;
  const KeyStages<float, kDim, kTf32Keys> stages = {
      keys, values, head_of<const float>(a.k, batch, head / p.group), head_of<const float>(a.v, batch, head / p.group),
      a.k.row, a.v.row, tile.limit, p.dim};
  start_copy<float, kDim, kForwardRows>(q, head_of<const float>(a.q, batch, head), a.q.row, tile.first,
                                        tile.first + tile.count, p.dim);
  stages.start_keys(0);
  stages.start_values(0);
  const int visible[2] = {visible_keys(p, tile, row), visible_keys(p, tile, row + 8)};
  const uint32_t sign = a.sign & 0x80000000u;
  SoftmaxRows<kDim> rows = {{}, {-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  int block = 0;
  for (; block < tile.common / kTf32Keys; ++block)
    attend_tf32<false>(rows, q, first_row, sign, stages, block, visible, a.scale_log2);
  for (; block * kTf32Keys < tile.limit; ++block)
    attend_tf32<true>(rows, q, first_row, sign, stages, block, visible, a.scale_log2);

  sum_totals(rows);
  float inverse[2];
  store_lse(inverse, rows, a, place, row);
  store_rows<kDim>(rows.acc, inverse, first_row, tile.count,
                   head_of<float>(a.out, batch, head) + tile.first * a.out.row, a.out.row, p.dim);
}

}  // namespace
}  // namespace var_kernels
