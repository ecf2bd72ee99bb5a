// Into how many splits a search of the codebook is divided, and how many vectors a thread takes.
#pragma once
#include <algorithm>
#include <type_traits>

#include "launch.h"

namespace var_kernels {

constexpr int64_t kMostRows = int64_t(1) << 30;  // and tiles of them: indices are 32-bit numbers

struct SearchSplits {
  int count, codes;  // codes of each split, a multiple of the tile; the last one may have fewer

  // For the candidates of all splits of `rows` vectors, none if there is one split.
  torch::stable::Tensor memory(const OnDevice& device, int64_t rows) const {
    return device.empty({count > 1 ? 2 * count * rows : 0}, torch::headeronly::ScalarType::Float);
  }
};

// The fewest splits that make the busiest multiprocessor's work least. A block's start and end, and the second kernel,
// cost about as much as two tiles of the codebook.
inline SearchSplits search_splits(int64_t row_tiles, int64_t codes, int64_t tile_codes, const OnDevice& device) {
  constexpr int64_t kOverhead = 2, kMostSplits = 128;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
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

// f of the vectors of a thread, eight times as many of the block: 8, or so few that half of them exist.
template <class F>
void with_thread_rows(int64_t rows, const F& f) {
  if (rows > 32) return f(std::integral_constant<int, 8>());
  if (rows > 16) return f(std::integral_constant<int, 4>());
  if (rows > 8) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, 1>());
}

}  // namespace var_kernels
