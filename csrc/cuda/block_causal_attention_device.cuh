// What the forward and backward kernels of block-causal attention share: where a thread block is, which elements are
// visible, tiles in shared memory, and the products of tiles by tensor cores.
#pragma once
#include "block_causal_attention_tiles.h"
#include "device.cuh"

namespace var_kernels {
namespace {

constexpr int kAttentionThreads = 128;

// A (B, H, L, D) tensor: strides in elements, the last one is 1.
struct GpuHeadRows {
  void* data;
  int64_t batch, head, row;
};

template <class T>
__device__ __forceinline__ T* head_of(const GpuHeadRows& x, int batch, int head) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head;
}

// What every kernel knows about the problem.
struct GpuAttentionProblem {
  int heads, group;  // the number of query heads, and how many of them share a key head
  int queries, keys, dim, q_offset;
  int pairs, section;  // the pairs of batch and head that the grid covers, and how many of them share the L2 cache
  AttentionSchedule schedule;
};

// ---- where a block is ---------------------------------------------------------------------------------------------

__device__ __forceinline__ int number(const AttentionSchedule& schedule, int i) {
  return schedule.in_memory != nullptr ? schedule.in_memory[i] : schedule.numbers[i];
}

struct AttentionPlace {
  int pair;
  AttentionTile tile;
};

// The table begins with the tiles that have the most work, so all heads start with those. The grid takes one section of
// heads after another. Otherwise each of a thousand heads would read its keys from memory, not from the L2 cache, at
// every tile.
__device__ __forceinline__ AttentionPlace my_place(const GpuAttentionProblem& p) {
  const int block = int(blockIdx.x), tiles = p.schedule.tiles;
  const int first = block / (tiles * p.section) * p.section, width = min(p.section, p.pairs - first);
  const int within = block - first * tiles, row = within / width * 4;
  return {first + within % width,
          {number(p.schedule, row), number(p.schedule, row + 1), number(p.schedule, row + 2),
           number(p.schedule, row + 3)}};
}

// How many keys a token sees: the end of its scale.
__device__ __forceinline__ int visible_keys(const AttentionSchedule& schedule, int token) {
  const int runs = schedule.tiles * 4;
  int low = 0, high = schedule.runs - 1;  // searches the last run that begins at or before the token
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (number(schedule, runs + 2 * middle) <= token)
      low = middle;
    else
      high = middle - 1;
  }
  const int first = number(schedule, runs + 2 * low), length = number(schedule, runs + 2 * low + 1);
  return first + ((token - first) / length + 1) * length;
}

// How many keys a row of a tile sees; 0 for rows that do not exist.
__device__ __forceinline__ int visible_keys(const GpuAttentionProblem& p, const AttentionTile& tile, int row) {
  if (row >= tile.count) return 0;
  return tile.common == tile.limit ? tile.limit : visible_keys(p.schedule, p.q_offset + tile.first + row);
}

// ---- tiles in shared memory ---------------------------------------------------------------------------------------

// A tile has rows of kDim elements without padding. The 16-byte chunks of a row are permuted: ldmatrix reads chunk c of
// 8 consecutive rows at once, and these 8 chunks must lie in 8 different groups of 4 banks. If a row is no multiple of
// 128 bytes (16-bit elements, kDim 96), every second row begins 64 bytes further in the banks, so permuting by two bits
// is enough.
template <class T, int kDim>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int kChunks = kDim / kPackWidth<T>;
  static_assert(kChunks % 4 == 0);
  const int permuted = kChunks % 8 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
  return row * kDim + permuted * kPackWidth<T>;
}

// Starts the copy of rows [first, first + kRows) of a head, with zeros from row `limit` and from column `dim` on. Eight
// threads copy 128 bytes of a row, or four threads 64 bytes. The chunks of a thread are then a multiple of 8 rows
// apart, so it computes one source address and one place in shared memory, and the others are at constant distances.
template <class T, int kDim, int kRows>
__device__ __forceinline__ void start_copy(T* tile, const T* head, int64_t row_stride, int first, int limit, int dim) {
  constexpr int kWidth = kPackWidth<T>, kChunks = kDim / kWidth;
  constexpr int kAcross = kChunks % 8 == 0 ? 8 : 4, kStep = kAttentionThreads / kAcross;
  static_assert(kRows % kStep == 0 && kChunks % kAcross == 0);
  const int row = int(threadIdx.x) / kAcross, chunk = int(threadIdx.x) % kAcross;
  const T* source = head + (first + row) * row_stride + chunk * kWidth;
  T* const target = tile + swizzled<T, kDim>(row, chunk);
#pragma unroll
  for (int r = 0; r < kRows; r += kStep, source += kStep * row_stride)
#pragma unroll
    for (int c = 0; c < kChunks; c += kAcross)
      ptx::cp_async16(target + r * kDim + c * kWidth, source + c * kWidth,
                      first + row + r < limit && (c + chunk) * kWidth < dim);
}

// ---- products -----------------------------------------------------------------------------------------------------

// Loads 16 rows of a tile, from `row` on, as the left operand of products over kDim.
template <class T, int kDim>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], const T* tile, int row, int k) {
  const int lane = int(threadIdx.x) % 32;
  ptx::ldmatrix_x4(a, tile + swizzled<T, kDim>(row + lane % 16, 2 * k + lane / 16));
}

// s (16, kRows) += a (16, 16) · tᵀ, t being columns [16 k, 16 k + 16) of a tile (kRows, kDim).
template <class T, int kDim, int kRows>
__device__ __forceinline__ void multiply_transposed(float (&s)[kRows / 8][4], const uint32_t (&a)[4], const T* tile,
                                                    int k) {
  const int lane = int(threadIdx.x) % 32, row = lane / 16 * 8 + lane % 8, chunk = 2 * k + lane / 8 % 2;
#pragma unroll
  for (int n = 0; n < kRows / 16; ++n) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, tile + n * 16 * kDim + swizzled<T, kDim>(row, chunk));
    ptx::mma_m16n8k16<T>(s[2 * n], a, b[0], b[1]);
    ptx::mma_m16n8k16<T>(s[2 * n + 1], a, b[2], b[3]);
  }
}

// acc (16, kDim) += p · tile, with p (16, kRows) rounded to T, and a tile (kRows, kDim).
template <class T, int kDim, int kRows>
__device__ __forceinline__ void multiply(float (&acc)[kDim / 8][4], const float (&p)[kRows / 8][4], const T* tile) {
  const int lane = int(threadIdx.x) % 32, row = lane % 16, chunk = lane / 16;
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    // The result of one product has the layout of the left operand of the next.
    const uint32_t a[4] = {pack2<T>(p[2 * k][0], p[2 * k][1]), pack2<T>(p[2 * k][2], p[2 * k][3]),
                           pack2<T>(p[2 * k + 1][0], p[2 * k + 1][1]), pack2<T>(p[2 * k + 1][2], p[2 * k + 1][3])};
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, tile + k * 16 * kDim + swizzled<T, kDim>(row, 2 * n + chunk));
      ptx::mma_m16n8k16<T>(acc[2 * n], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(acc[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Stores a warp's 16 rows of products, beginning at row `row` of a tile that has `count` rows and begins at `target`.
// The products pass through the warp's own rows of `tile`, so that they can be stored 16 bytes at a time.
template <class T, int kDim>
__device__ __forceinline__ void store_rows(const float (&acc)[kDim / 8][4], const float (&factor)[2], T* tile, int row,
                                           int count, T* target, int64_t row_stride, int dim) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      T* const to = tile + swizzled<T, kDim>(row + lane / 4 + 8 * half, n) + lane % 4 * 2;
      *reinterpret_cast<uint32_t*>(to) = pack2<T>(acc[n][2 * half] * factor[half], acc[n][2 * half + 1] * factor[half]);
    }
  __syncwarp();
  constexpr int kChunks = kDim / 8;
#pragma unroll
  for (int i = 0; i < 16 * kChunks / 32; ++i) {
    const int index = lane + i * 32, r = row + index / kChunks, chunk = index % kChunks;
    if (r >= count || chunk * 8 >= dim) continue;
    const uint4* const from = reinterpret_cast<const uint4*>(tile + swizzled<T, kDim>(r, chunk));
    ptx::store16(target + r * row_stride + chunk * 8, make_uint4(from->x, from->y, from->z, from->w));
  }
}

// Stores a warp's 16 rows of products in fp32, beginning at row `row` of a tile that has `count` rows and begins at
// `target`. Two neighbouring lanes hold two columns each of two rows. The even lane stores all four columns of the
// first row, the odd lane those of the second.
template <int kDim>
__device__ __forceinline__ void store_rows(const float (&acc)[kDim / 8][4], const float (&factor)[2], int row,
                                           int count, float* target, int64_t row_stride, int dim) {
  const int lane = int(threadIdx.x) % 32, column = lane % 4 / 2 * 4;
  const bool odd = lane % 2 != 0;
  const int r = row + lane / 4 + (odd ? 8 : 0);
  target += r * row_stride + column;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    const float first = __shfl_xor_sync(kFullWarp, odd ? acc[n][0] : acc[n][2], 1);
    const float second = __shfl_xor_sync(kFullWarp, odd ? acc[n][1] : acc[n][3], 1);
    if (r >= count || n * 8 + column >= dim) continue;
    const float f = odd ? factor[1] : factor[0];
    ptx::store16(target + n * 8, odd ? pack<float>({first * f, second * f, acc[n][2] * f, acc[n][3] * f})
                                     : pack<float>({acc[n][0] * f, acc[n][1] * f, first * f, second * f}));
  }
}

// ---- softmax ------------------------------------------------------------------------------------------------------

constexpr float kLn2 = 0.693147180559945309f;

// The number that is subtracted from the scores of a row. It is the maximum if that is finite. If the maximum is -inf
// (all scores so far are -inf) or inf, a difference inf - inf would be NaN, but exp2(-inf) = 0 and exp2(inf) = inf are
// wanted: subtracting 0 gives these, and with them PyTorch's results, out = 0/0 and lse = -inf or inf.
__device__ __forceinline__ float finite_shift(float peak) { return fabsf(peak) == INFINITY ? 0.0f : peak; }

// lse, from the maximum of the scores (in units of ln(2)) and the sum of the exponentials after the maximum is
// subtracted.
__device__ __forceinline__ float log_sum_exp(float peak, float total) {
  return fmaf(finite_shift(peak), kLn2, log2f(total) * kLn2);
}

}  // namespace
}  // namespace var_kernels
