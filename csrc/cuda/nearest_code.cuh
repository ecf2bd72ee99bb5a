// nearest_code on CUDA devices. A block searches the codes of up to 64 vectors, in the whole codebook. If there are too
// few vectors to keep the GPU busy, it searches in one of several splits of the codebook, and a second kernel compares
// the winners of the splits.
#pragma once
#include "../nearest_code_centre.h"
#include "nearest_code_search.cuh"

namespace var_kernels {
namespace {

constexpr int kSearchThreads = 128;
template <int kThreadRows>
using NearestTile = SearchTile<kThreadRows, 8, 2, 2>;

// Where the code of vector `row` is stored. The codes of an image are consecutive; images are `stride` apart.
struct TokenPlaces {
  int64_t* tokens;
  int per_image;
  int64_t stride;

  __device__ __forceinline__ int64_t& of(int row) const {
    return tokens[row / per_image * stride + row % per_image];
  }
};

struct NearestCode {
  Matrix z, codebook;
  TokenPlaces places;
  Candidate* candidates;  // (splits, rows), used if there are several splits
  int split_codes;        // codes of a split, a multiple of the tile
  bool normalised;  // whether the codes are
};

template <class Tile>
constexpr size_t nearest_code_shared_bytes(int channels) {
  const int z_stages = channels > kChunk ? 2 : 1;
  return sizeof(SearchMemory<Tile>) + sizeof(float) * z_stages * Tile::kRows * kChunkPitch;
}

// The grid is the tiles of vectors by splits. Vectors of one chunk stay in shared memory; longer ones stream like
// codes.
template <bool kVectors, int kThreadRows>
__global__ void __launch_bounds__(kSearchThreads, 3) nearest_code_kernel(NearestCode a) {
  using Tile = NearestTile<kThreadRows>;
  static_assert(Tile::kThreads == kSearchThreads);
  VAR_DYN_SMEM(shared);
  auto& memory = *reinterpret_cast<SearchMemory<Tile>*>(shared);
  float* const z_tiles = reinterpret_cast<float*>(&memory + 1);
  const int first_row = int(blockIdx.x) * Tile::kRows, begin = int(blockIdx.y) * a.split_codes;
  const int end = min(begin + a.split_codes, a.codebook.rows);
  const bool streams = a.z.channels > kChunk;
  const auto z_tile = [&](int step) { return z_tiles + (streams ? step % 2 * Tile::kRows * kChunkPitch : 0); };
  const Candidate best = search_codes<Tile>(
      memory, begin, end, a.z.channels, a.normalised, kChunkPitch, [&](int step, int) { return z_tile(step); },
      [&](int step, int code, int channel, float* target) {
        if (streams || step == 0) start_chunk<kVectors>(z_tile(step), Tile::kRows, a.z, first_row, channel);
        start_chunk<kVectors>(target, Tile::kCodes, a.codebook, code, channel);
      });
  const int row = first_row + int(threadIdx.x);
  if (int(threadIdx.x) >= Tile::kRows || row >= a.z.rows) return;
  if (gridDim.y == 1)
    a.places.of(row) = best.index;
  else
    a.candidates[int64_t(blockIdx.y) * a.z.rows + row] = best;
}

// Writes codes divided by max(|c|, 1e-12), dense, with one warp per code. As in the reference, codes are divided before
// they are multiplied: codes that point the same way are then equal, and the lowest of their indices wins.
template <class T>
__global__ void __launch_bounds__(kSearchThreads) normalise_codes_kernel(Matrix codebook, float* out) {
  const int code = int(blockIdx.x) * (kSearchThreads / 32) + int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (code >= codebook.rows) return;  // the whole warp
  const T* const row = static_cast<const T*>(codebook.data) + code * codebook.stride;
  float sum = 0.0f;
  for (int c = lane; c < codebook.channels; c += 32) sum = fmaf(to_float(row[c]), to_float(row[c]), sum);
  float norm = sqrtf(warp_sum(sum));
  if (norm < 1e-12f) norm = 1e-12f;  // a NaN stays NaN
  for (int c = lane; c < codebook.channels; c += 32)
    out[int64_t(code) * codebook.channels + c] = to_float(row[c]) / norm;
}

// The centre of the codebook in channel c, a point near the codes: the middle between the least and the greatest finite
// element of kCentreCodes codes, spread evenly over the codebook, if it is farther from 0 than they are apart; else 0.
template <class T>
__device__ __forceinline__ float centre_of(const Matrix& codebook, int c) {
  float low = INFINITY, high = -INFINITY;
  for (int i = 0; i < kCentreCodes; ++i) {
    const int64_t code = int64_t(i) * codebook.rows / kCentreCodes;
    const float x = to_float(static_cast<const T*>(codebook.data)[code * codebook.stride + c]);
    if (!(fabsf(x) < INFINITY)) continue;
    low = fminf(low, x);
    high = fmaxf(high, x);
  }
  const float middle = 0.5f * low + 0.5f * high;
  return fabsf(middle) > high - low ? middle : 0.0f;
}

// Writes the centre, and codes and vectors counted from it, dense. Distances stay the same, while scores become as small
// as the distances, and so do their rounding errors. A block has kCentredRows codes or vectors, a lane has channels.
constexpr int kCentredRows = 64;

template <class T>
__global__ void __launch_bounds__(kSearchThreads)
    centre_kernel(Matrix codebook, Matrix z, float* codes, float* vectors, float* centre) {
  const int code_blocks = (codebook.rows + kCentredRows - 1) / kCentredRows, block = int(blockIdx.x);
  const bool of_codes = block < code_blocks;
  const T* const from = static_cast<const T*>(of_codes ? codebook.data : z.data);
  const int64_t stride = of_codes ? codebook.stride : z.stride;
  float* const to = of_codes ? codes : vectors;
  const int first = (of_codes ? block : block - code_blocks) * kCentredRows;
  const int end = min(first + kCentredRows, of_codes ? codebook.rows : z.rows), channels = codebook.channels;
  for (int c = int(threadIdx.x) % 32; c < channels; c += 32) {
    const float point = centre_of<T>(codebook, c);
    if (block == 0 && threadIdx.x < 32) centre[c] = point;
    for (int row = first + int(threadIdx.x) / 32; row < end; row += kSearchThreads / 32)
      to[int64_t(row) * channels + c] = to_float(from[row * stride + c]) - point;
  }
}

// Compares in the order of the splits, so that among equal scores the lowest index wins.
__global__ void __launch_bounds__(kSearchThreads)
    best_candidate_kernel(const Candidate* candidates, int splits, int rows, TokenPlaces places) {
  const int row = int(blockIdx.x) * kSearchThreads + int(threadIdx.x);
  if (row >= rows) return;
  Candidate winner = kNoCandidate;
  for (int split = 0; split < splits; ++split) winner = better(winner, candidates[int64_t(split) * rows + row]);
  places.of(row) = winner.index;
}

}  // namespace
}  // namespace var_kernels
