// The search for the nearest codes of a tile of vectors, which nearest_code and multi_scale_quantize share.
//
//   score(z, c) = z·c - |c|²/2, which is -|z - c|²/2 plus a term that all codes share; for normalised codes it is z·c
// The largest score wins; among equal scores, the lowest index. Sums are fp32 multiply-adds over the channels in their
// order, for every shape of tile. So equal codes have equal scores, and the code of a vector does not depend on the
// other vectors of the call.
//
// A block goes through the codebook in tiles of kCodes codes by kChunk channels. Two tiles are in shared memory: one is
// multiplied while the next is copied. A thread has kThreadRows vectors and kThreadCodes codes. For each 4 channels it
// loads a 16-byte piece of each and does 4·rows·codes multiply-adds. The best score so far stays in registers; at the
// end, the lanes and warps that share a vector compare theirs. |c|² is summed from the tile itself, one code per
// thread: this is a thirty-second of the work, and nothing has to be prepared or stored.
#pragma once
#include <climits>

#include "device.cuh"

namespace var_kernels {
namespace {

constexpr int kChunk = 32;
// The pitch of a row of a chunk in shared memory. A quarter of a warp reads the same piece of 8 rows, which this pitch
// spreads over 32 banks.
constexpr int kChunkPitch = kChunk + 4;

// How the threads of a block are assigned to vectors and codes. A warp is 4 lanes of vectors by 8 lanes of codes.
template <int kThreadRows_, int kThreadCodes_, int kRowWarps_, int kCodeWarps_>
struct SearchTile {
  static constexpr int kThreadRows = kThreadRows_, kThreadCodes = kThreadCodes_, kRowWarps = kRowWarps_;
  static constexpr int kCodeWarps = kCodeWarps_, kThreads = 32 * kRowWarps * kCodeWarps;
  static constexpr int kRows = 4 * kThreadRows * kRowWarps, kCodes = 8 * kThreadCodes * kCodeWarps;
  static_assert(kThreads >= kCodes && kThreads >= kRows);

  static __device__ __forceinline__ int first_row() {
    return int(threadIdx.x) / 32 / kCodeWarps * 4 * kThreadRows + int(threadIdx.x) % 32 / 8;
  }
  static __device__ __forceinline__ int first_code() {
    return int(threadIdx.x) / 32 % kCodeWarps * 8 * kThreadCodes + int(threadIdx.x) % 8;
  }
};

// Rows of `channels` dense elements; `stride` elements from one to the next.
struct Matrix {
  const void* data;
  int64_t stride;
  int rows, channels;
};

constexpr int64_t kMostRows = int64_t(1) << 30;  // so that 32-bit numbers can count them, and the tiles after their end

// Whether rows of fp32 consist of aligned pieces of 16 bytes.
inline bool vectors_fit(const Matrix& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride % 4 == 0 && matrix.channels % 4 == 0;
}

struct Candidate {
  float score;
  int index;
};
constexpr Candidate kNoCandidate = {-INFINITY, 0};

__device__ __forceinline__ Candidate better(const Candidate& a, const Candidate& b) {
  return b.score > a.score || (b.score == a.score && b.index < a.index) ? b : a;
}

// ---- what is in shared memory -------------------------------------------------------------------------------------

template <class Tile>
struct SearchMemory {
  float codes[2][Tile::kCodes * kChunkPitch];
  float terms[Tile::kCodes];
  Candidate winners[Tile::kCodeWarps][Tile::kRows];
};

// Starts the copy of channels [first_channel, first_channel + kChunk) of `count` rows; missing elements are zero.
// kVectors: the rows consist of aligned pieces of 16 bytes.
template <bool kVectors>
__device__ __forceinline__ void start_chunk(float* tile, int count, const Matrix& matrix, int first_row,
                                            int first_channel) {
  if constexpr (kVectors) {
    constexpr int kPieces = kChunk / 4;
    for (int i = int(threadIdx.x); i < count * kPieces; i += int(blockDim.x)) {
      const int row = first_row + i / kPieces, channel = first_channel + i % kPieces * 4;
      ptx::cp_async16(tile + i / kPieces * kChunkPitch + i % kPieces * 4,
                      static_cast<const float*>(matrix.data) + row * matrix.stride + channel,
                      row < matrix.rows && channel < matrix.channels);
    }
  } else {
    for (int i = int(threadIdx.x); i < count * kChunk; i += int(blockDim.x)) {
      const int row = first_row + i / kChunk, channel = first_channel + i % kChunk;
      const bool exists = row < matrix.rows && channel < matrix.channels;
      tile[i / kChunk * kChunkPitch + i % kChunk] =
          exists ? static_cast<const float*>(matrix.data)[row * matrix.stride + channel] : 0.0f;
    }
  }
}

// ---- the search ---------------------------------------------------------------------------------------------------

// sums += vectors · codes, over the channels of one chunk.
template <class Tile>
__device__ __forceinline__ void multiply_chunk(float (&sums)[Tile::kThreadRows][Tile::kThreadCodes], const float* z,
                                               int pitch, const float* codes) {
#pragma unroll 1  // unrolled twice, the operands would take the registers of a third block
  for (int piece = 0; piece < kChunk; piece += 4) {
    float4 a[Tile::kThreadRows];
#pragma unroll
    for (int i = 0; i < Tile::kThreadRows; ++i) a[i] = *reinterpret_cast<const float4*>(z + 4 * i * pitch + piece);
#pragma unroll
    for (int j = 0; j < Tile::kThreadCodes; ++j) {
      const float4 b = *reinterpret_cast<const float4*>(codes + 8 * j * kChunkPitch + piece);
#pragma unroll
      for (int i = 0; i < Tile::kThreadRows; ++i)
        sums[i][j] = fmaf(a[i].w, b.w, fmaf(a[i].z, b.z, fmaf(a[i].y, b.y, fmaf(a[i].x, b.x, sums[i][j]))));
    }
  }
}

__device__ __forceinline__ void add_squares(float4& squares, const float* code) {
#pragma unroll
  for (int piece = 0; piece < kChunk; piece += 4) {
    const float4 c = *reinterpret_cast<const float4*>(code + piece);
    squares.x = fmaf(c.x, c.x, squares.x);
    squares.y = fmaf(c.y, c.y, squares.y);
    squares.z = fmaf(c.z, c.z, squares.z);
    squares.w = fmaf(c.w, c.w, squares.w);
  }
}

// The term that turns a product into a score. A code that does not exist is never chosen.
__device__ __forceinline__ float score_term(const float4& squares, bool exists) {
  return exists ? -0.5f * ((squares.x + squares.y) + (squares.z + squares.w)) : -INFINITY;
}

// The best of codes [begin, end). Each of the first kRows threads returns that of vector threadIdx.x of the tile.
//
// z(step, chunk) returns kRows rows in shared memory, `pitch` apart, from the chunk's first channel on, with zeros
// after the last channel. start(step, code, channel, target) starts the copy of kCodes codes by kChunk channels. All
// threads can read both when the block has waited for its copies and passed a barrier. After this function returns, no
// thread reads them.
template <class Tile, class Z, class Start>
__device__ __forceinline__ Candidate search_codes(SearchMemory<Tile>& memory, int begin, int end, int channels,
                                                  bool normalised, int pitch, const Z& z, const Start& start) {
  static_assert(sizeof(SearchMemory<Tile>) % 16 == 0);  // the memory after it is read 16 bytes at a time
  const int thread = int(threadIdx.x), chunks = (channels + kChunk - 1) / kChunk;
  const int steps = (end - begin + Tile::kCodes - 1) / Tile::kCodes * chunks;
  const auto start_step = [&](int step) {
    if (step < steps)
      start(step, begin + step / chunks * Tile::kCodes, step % chunks * kChunk, memory.codes[step % 2]);
    ptx::cp_async_commit();
  };
  Candidate best[Tile::kThreadRows];
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i) best[i] = kNoCandidate;
  float sums[Tile::kThreadRows][Tile::kThreadCodes] = {};
  float4 squares = {};
  start_step(0);
  for (int step = 0, chunk = 0, code = begin; step < steps; ++step) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tile has landed, and every warp is done with the other one
    start_step(step + 1);
    const float* const codes = memory.codes[step % 2];
    if (thread < Tile::kCodes && !normalised) add_squares(squares, codes + thread * kChunkPitch);
    multiply_chunk<Tile>(sums, z(step, chunk) + Tile::first_row() * pitch, pitch,
                         codes + Tile::first_code() * kChunkPitch);
    if (++chunk < chunks) continue;
    if (thread < Tile::kCodes) memory.terms[thread] = score_term(squares, code + thread < end);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < Tile::kThreadCodes; ++j) {
      const float term = memory.terms[Tile::first_code() + 8 * j];
      const int index = code + Tile::first_code() + 8 * j;
#pragma unroll
      for (int i = 0; i < Tile::kThreadRows; ++i) {
        const float score = sums[i][j] + term;
        if (score > best[i].score) best[i] = {score, index};  // never true for NaN; the indices of a thread increase
        sums[i][j] = 0.0f;
      }
    }
    squares = {};
    chunk = 0;
    code += Tile::kCodes;
  }
#pragma unroll
  for (int i = 0; i < Tile::kThreadRows; ++i) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) {
      const float score = __shfl_xor_sync(kFullWarp, best[i].score, lanes);
      best[i] = better(best[i], {score, __shfl_xor_sync(kFullWarp, best[i].index, lanes)});
    }
    if (thread % 8 == 0) memory.winners[thread / 32 % Tile::kCodeWarps][Tile::first_row() + 4 * i] = best[i];
  }
  __syncthreads();
  Candidate winner = kNoCandidate;
  if (thread < Tile::kRows)
#pragma unroll
    for (int warp = 0; warp < Tile::kCodeWarps; ++warp) winner = better(winner, memory.winners[warp][thread]);
  return winner;
}

}  // namespace
}  // namespace var_kernels
