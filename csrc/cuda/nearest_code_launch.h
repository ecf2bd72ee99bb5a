// The launcher of nearest_code, for the entry functions that search. It decides into how many splits a search of the
// codebook is divided, and how many vectors a thread takes.
#pragma once
#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "nearest_code.cuh"

namespace var_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct SearchSplits {
  int count, codes;  // splits; codes of each, a multiple of the tile (the last split may have fewer)
};

// The number of splits with which the busiest multiprocessor has the least work; of equal numbers, the smallest. The
// start and end of a block, and the second kernel, cost about as much as two tiles of the codebook.
inline SearchSplits search_splits(int64_t row_tiles, int64_t codes, int64_t tile_codes, const OnDevice& device) {
  constexpr int64_t kOverhead = 2, kMostSplits = 128;
  const int64_t tiles = ceil_div(codes, tile_codes), processors = multiprocessors(device);
  int64_t best = 1, least = ceil_div(row_tiles, processors) * (tiles + kOverhead);
  for (int64_t splits = 2; splits <= std::min(tiles, kMostSplits); ++splits) {
    const int64_t work =
        ceil_div(row_tiles * splits, processors) * (ceil_div(tiles, splits) + kOverhead) + kOverhead;
    if (work < least) best = splits, least = work;
  }
  const int64_t split_tiles = ceil_div(tiles, best);
  return {int(ceil_div(tiles, split_tiles)), int(split_tiles * tile_codes)};
}

// Calls f with the number of vectors of a thread; a block has eight times as many. It is 8, or fewer if fewer vectors
// exist: at least half of a block's vectors should exist.
template <class F>
void with_thread_rows(int64_t rows, const F& f) {
  if (rows > 32) return f(std::integral_constant<int, 8>());
  if (rows > 16) return f(std::integral_constant<int, 4>());
  if (rows > 8) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, 1>());
}

template <bool kVectors>
void search_with(const OnDevice& device, NearestCode arguments) {
  with_thread_rows(arguments.z.rows, [&](auto thread_rows) {
    constexpr int kThreadRows = decltype(thread_rows)::value;
    using Tile = NearestTile<kThreadRows>;
    const int rows = arguments.z.rows, row_tiles = int(ceil_div(rows, Tile::kRows));
    const SearchSplits splits = search_splits(row_tiles, arguments.codebook.rows, Tile::kCodes, device);
    Tensor candidates = device.empty({splits.count > 1 ? 2 * int64_t(splits.count) * rows : 0}, ScalarType::Float);
    arguments.split_codes = splits.codes;
    arguments.candidates = reinterpret_cast<Candidate*>(candidates.mutable_data_ptr<float>());
    const LaunchShape shape = {dim3(unsigned(row_tiles), unsigned(splits.count)), dim3(kSearchThreads),
                               nearest_code_shared_bytes<Tile>(arguments.z.channels)};
    launch(device, "nearest_code", nearest_code_kernel<kVectors, kThreadRows>, shape, arguments);
    if (splits.count > 1)
      launch(device, "nearest_code splits", best_candidate_kernel,
             {dim3(unsigned(ceil_div(rows, kSearchThreads))), dim3(kSearchThreads)},
             arguments.candidates, splits.count, rows, arguments.places);
  });
}

// Makes the dense, normalised codes of a codebook of T.
template <class T>
Tensor normalised_codes(const OnDevice& device, const Matrix& codebook) {
  Tensor codes = device.empty({codebook.rows, codebook.channels}, ScalarType::Float);
  constexpr int kCodes = kSearchThreads / 32;
  launch(device, "nearest_code normalised", normalise_codes_kernel<T>,
         {dim3(unsigned(ceil_div(codebook.rows, kCodes))), dim3(kSearchThreads)}, codebook,
         codes.mutable_data_ptr<float>());
  return codes;
}

// Codes and vectors counted from the centre of the codes, dense.
struct Centred {
  Tensor codes, vectors, centre;
};

template <class T>
Centred centred(const OnDevice& device, const Matrix& codebook, const Matrix& z) {
  const int channels = codebook.channels;
  Centred result = {device.empty({codebook.rows, channels}, ScalarType::Float),
                    device.empty({z.rows, channels}, ScalarType::Float), device.empty({channels}, ScalarType::Float)};
  const int64_t blocks = ceil_div(codebook.rows, kCentredRows) + ceil_div(z.rows, kCentredRows);
  launch(device, "nearest_code centre", centre_kernel<T>, {dim3(unsigned(blocks)), dim3(kSearchThreads)}, codebook, z,
         result.codes.mutable_data_ptr<float>(), result.vectors.mutable_data_ptr<float>(),
         result.centre.mutable_data_ptr<float>());
  return result;
}

// Searches the codes of vectors, which are fp32 as the codes are; there is at least one vector.
inline void search(const OnDevice& device, const NearestCode& arguments) {
  vectors_fit(arguments.z) && vectors_fit(arguments.codebook) ? search_with<true>(device, arguments)
                                                              : search_with<false>(device, arguments);
}

}  // namespace
}  // namespace var_kernels
