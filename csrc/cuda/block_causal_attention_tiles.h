// The tiles of a block-causal score matrix. The host finds them, and the kernels read them.
//
// The visible part of the matrix is a staircase. A kernel cuts the rows (or the keys) into tiles of limited size, and
// for each tile walks over whole blocks of the other side. The places of the cuts decide how much of the invisible part
// is visited. A tile that ends where a scale ends visits nothing that its last row does not see. Small scales share a
// tile, because a tile of few rows costs as much as a full one.
//
// Each call computes the tables again, which takes a few microseconds, and passes them as arguments of the kernel. So
// nothing is copied, nothing is cached that a CUDA graph could outlive, and a new schedule needs no new kernel.
// Schedules that are too long for arguments (a few hundred different lengths, or some ten thousand tokens) are written
// to device memory by kernels that take a part of them as arguments each. A graph can capture that as well.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "../ceil_div.h"

namespace var_kernels {

// A tile of query rows has `count` rows from `first` on. All of them see the keys below `common`, and some of them see
// keys up to `limit`. A tile of keys has `count` keys from `first` on. Rows from `common` on see all of them, and rows
// below `limit` see none.
struct AttentionTile {
  int32_t first, count, common, limit;
};
static_assert(sizeof(AttentionTile) == 4 * sizeof(int32_t));

// The tiles as numbers, and after them the lengths of the scales as runs. A run is its first token and the length that
// every scale has from there to the next run.
struct AttentionSchedule {
  static constexpr int kInline = 896;  // numbers; all arguments stay below the 4 KiB of any driver

  int tiles, runs;
  const int32_t* in_memory;  // the numbers if there are more than kInline, else null
  int32_t numbers[kInline];
};

namespace attention_tiles {

using Lens = std::vector<int64_t>;

// Cuts [0, bounds.back()) into pieces of at most `size` such that the sum of the pieces' costs is least.
//
// A piece costs costs[i], where i is the interval (bounds[i-1], bounds[i]] of its last element, plus 1 for its start;
// costs do not decrease. If there is room, the elements of equal cost that follow may join the piece for nothing. So a
// piece either ends at a bound or is full, and few ends have to be tried.
inline std::vector<std::pair<int64_t, int64_t>> cheapest_cuts(const Lens& bounds, const Lens& costs, int64_t size) {
  Lens ends, prices;
  for (size_t i = 0; i < bounds.size(); ++i) {
    if (i + 1 < bounds.size() && costs[i] == costs[i + 1]) continue;
    ends.push_back(bounds[i]);
    prices.push_back(costs[i]);
  }
  constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  struct Cut {
    int64_t cost = kNever, before = 0;  // the cost of everything before it, and the cut before it
  };
  std::vector<Cut> best(ends.back() + 1);
  best[0].cost = 0;
  for (int64_t begin = 0; begin < ends.back(); ++begin) {
    if (best[begin].cost == kNever) continue;
    for (size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); i < ends.size(); ++i) {
      const int64_t end = std::min(ends[i], begin + size), cost = best[begin].cost + prices[i] + 1;
      if (cost < best[end].cost) best[end] = {cost, begin};
      if (end < ends[i] || end == begin + size) break;
    }
  }
  std::vector<std::pair<int64_t, int64_t>> pieces;
  for (int64_t end = ends.back(); end > 0; end = best[end].before) pieces.emplace_back(best[end].before, end);
  std::reverse(pieces.begin(), pieces.end());
  return pieces;
}

// Cuts the query rows, tokens `q_offset` to `q_offset + queries`, into tiles of at most `rows`, for a kernel that
// visits the keys from 0 in blocks of `keys`. The tiles with the most work come first; the short ones fill the gaps at
// the end.
inline std::vector<AttentionTile> of_queries(const Lens& lens, int64_t q_offset, int64_t queries, int64_t rows,
                                             int64_t keys) {
  Lens ends, bounds, costs;
  int64_t end = 0;
  for (const int64_t length : lens) {
    end += length;
    if (end <= q_offset) continue;
    ends.push_back(end);
    bounds.push_back(std::min(end - q_offset, queries));
    costs.push_back(ceil_div(end, keys));
    if (bounds.back() == queries) break;
  }
  const auto visible = [&](int64_t row) {
    return int32_t(ends[std::upper_bound(bounds.begin(), bounds.end(), row) - bounds.begin()]);
  };
  std::vector<AttentionTile> tiles;
  for (const auto& [begin, stop] : cheapest_cuts(bounds, costs, rows))
    tiles.push_back({int32_t(begin), int32_t(stop - begin), visible(begin), visible(stop - 1)});
  std::stable_sort(tiles.begin(), tiles.end(), [](const auto& a, const auto& b) { return a.limit > b.limit; });
  return tiles;
}

// Cuts all keys into tiles of at most `keys`, for a kernel that visits, in blocks of `rows`, the rows that see some key
// of the tile. A tile that no row sees has limit = common = queries. The tiles with the most work come first.
inline std::vector<AttentionTile> of_keys(const Lens& lens, int64_t q_offset, int64_t queries, int64_t keys,
                                          int64_t rows) {
  Lens starts, first_rows, bounds, costs;
  int64_t total = 0;
  for (const int64_t length : lens) {
    starts.push_back(total);
    first_rows.push_back(std::clamp<int64_t>(total - q_offset, 0, queries));
    total += length;
  }
  // The rows that see a tile follow from its first key. Counted backwards from the last key, this is the problem above.
  for (size_t i = starts.size(); i-- > 0;) {
    bounds.push_back(total - starts[i]);
    costs.push_back(ceil_div(queries - first_rows[i], rows));
  }
  const auto first_row = [&](int64_t key) {
    return int32_t(first_rows[std::upper_bound(starts.begin(), starts.end(), key) - starts.begin() - 1]);
  };
  std::vector<AttentionTile> tiles;
  for (const auto& [begin, stop] : cheapest_cuts(bounds, costs, keys)) {
    const int64_t first = total - stop, last = total - begin - 1;
    tiles.push_back({int32_t(first), int32_t(last + 1 - first), first_row(last), first_row(first)});
  }
  std::stable_sort(tiles.begin(), tiles.end(), [](const auto& a, const auto& b) { return a.limit < b.limit; });
  return tiles;
}

// The numbers of a schedule (see AttentionSchedule). `runs` receives the number of runs.
inline std::vector<int32_t> numbers_of(const std::vector<AttentionTile>& tiles, const Lens& lens, int& runs) {
  std::vector<int32_t> numbers;
  numbers.reserve(4 * tiles.size() + 2 * lens.size());
  for (const AttentionTile& tile : tiles)
    numbers.insert(numbers.end(), {tile.first, tile.count, tile.common, tile.limit});
  int64_t token = 0;
  runs = 0;
  for (size_t i = 0; i < lens.size(); token += lens[i++]) {
    if (i > 0 && lens[i] == lens[i - 1]) continue;
    numbers.insert(numbers.end(), {int32_t(token), int32_t(lens[i])});
    ++runs;
  }
  return numbers;
}

}  // namespace attention_tiles
}  // namespace var_kernels
