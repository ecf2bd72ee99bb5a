// Forward: for a tile of query rows, one pass over the visible keys with the softmax computed online.
//
//   scores = softmax_scale · Q Kᵀ,   m = running row maximum,   P = exp(scores − m),   O = Σ P V,   l = Σ P
//
// When a later block raises m, O and l are multiplied by exp(m_old − m_new). At the end out = O / l, lse = m + log l.
// All operands are fp32 in cache: K as transposed strips and V as rows, converted once per task, Q once per tile.
#include "block_causal_attention_tile.h"

namespace var_kernels::VAR_ISA {
namespace {

constexpr int64_t kFewRows = 4;  // up to here dot products with K as it lies beat transposing K first

struct ForwardScratch {
  float* keys;     // strips [D][kStrip]
  float* values;   // (keys, padded D)
  float* queries;  // (rows, padded D), times softmax_scale
  float* scores;   // (rows, kScoreRow)
  float* out;      // (rows, padded D), relative to the running maximum
  float* sum;      // (rows, kWidth): l, one partial sum per lane
  float* max;      // (rows): m
  int64_t size;
};

// A task of one tile uses every key once: it packs each block just before use, into the same place.
VAR_INLINE bool streams(const AttentionForwardTask& task) { return task.unit_end - task.unit_begin == 1; }

// Decided by the tile alone: the two ways round differently, and how tiles are split into tasks depends on the threads.
VAR_INLINE bool few_rows(QueryTile tile) { return tile.end - tile.begin <= kFewRows; }

ForwardScratch carve(const AttentionProblem& p, const AttentionForwardTask& task, float* base) {
  const int64_t padded = round_up(p.dim, kWidth), keys = streams(task) ? kBlock : round_up(p.keys, kBlock);
  int64_t taken = 0;
  const auto take = [&taken, base](int64_t floats) {
    float* memory = base ? base + taken : nullptr;  // without memory only the size is wanted
    taken += round_up(floats, 16);
    return memory;
  };
  ForwardScratch s;
  s.keys = take(keys * p.dim);
  s.values = take(keys * padded);
  s.queries = take(kMaxTileRows * padded);
  s.scores = take(kMaxTileRows * kScoreRow);
  s.out = take(kMaxTileRows * padded);
  s.sum = take(kMaxTileRows * kWidth);
  s.max = take(kMaxTileRows);
  s.size = taken;
  return s;
}

int64_t scratch_size(const AttentionProblem& problem, const AttentionForwardTask& task) {
  return carve(problem, task, nullptr).size;
}

// Convert the keys [begin, end).
template <class T>
void pack_keys(const AttentionForwardArgs& args, const AttentionForwardTask& task, int64_t begin, int64_t end,
               float* keys) {
  const int64_t dim = args.problem.dim;
  for (int64_t key = begin; key < end; key += kStrip)
    pack_strip(row_of<const T>(args.k, task.batch, task.kv_head, key), args.k.row, min_i(end - key, kStrip), dim,
               keys + (key - begin) * dim);
}
template <class T>
void pack_values(const AttentionForwardArgs& args, const AttentionForwardTask& task, int64_t begin, int64_t end,
                 float* values) {
  load_rows(row_of<const T>(args.v, task.batch, task.kv_head, begin), args.v.row, end - begin, args.problem.dim, 1.0f,
            values, round_up(args.problem.dim, kWidth));
}

// Scores of a few rows without packing: one dot product per key, kWidth keys at a time. The kWidth accumulators are
// added up by a transposition that adds at every step, so that lane i holds the sum of accumulator i.
template <int Step>
VAR_INLINE Vec reduce_each(Vec (&acc)[kWidth]) {
  for (int i = 0; i < Step; ++i) {
    exchange<Step>(acc[i], acc[i + Step], std::make_integer_sequence<int, kWidth>());
    acc[i] += acc[i + Step];
  }
  if constexpr (Step > 1) return reduce_each<Step / 2>(acc);
  return acc[0];
}
template <class T>
void dot_keys(const AttentionForwardArgs& args, const AttentionForwardTask& task, int64_t begin, int64_t columns,
              int64_t rows, const float* queries, float* scores) {
  const int64_t dim = args.problem.dim, padded = round_up(dim, kWidth), whole = dim / kWidth * kWidth;
  for (int64_t c = 0; c < columns; c += kWidth) {
    const T* keys[kWidth];  // beyond the last key: the last key again, hidden later
    for (int i = 0; i < kWidth; ++i)
      keys[i] = row_of<const T>(args.k, task.batch, task.kv_head, begin + min_i(c + i, columns - 1));
    for (int64_t r = 0; r < rows; ++r) {
      Vec acc[kWidth] = {};
      for (int64_t d = 0; d < whole; d += kWidth) {
        const Vec q = load(queries + r * padded + d);
        for (int i = 0; i < kWidth; ++i) acc[i] += load(keys[i] + d) * q;
      }
      if (whole < dim) {
        const Vec q = load(queries + r * padded + whole);
        for (int i = 0; i < kWidth; ++i) acc[i] += load_tail(keys[i] + whole, dim - whole) * q;
      }
      store(scores + r * kScoreRow + c, reduce_each<kWidth / 2>(acc));
    }
  }
}

// One row and one block: scores become P, the running maximum and sum move on. Returns the factor of the row of O.
VAR_INLINE float online_softmax(float* row, int64_t columns, float* max, float* sum) {
  Vec top = load(row);
  for (int64_t c = kWidth; c < columns; c += kWidth) top = max_v(load(row + c), top);
  const float before = *max, block = reduce_max(top), after = block > before ? block : before;
  const float base = after == -kInfinity ? 0.0f : after;  // -inf − -inf would be NaN where P is 0
  Vec total{};
  for (int64_t c = 0; c < columns; c += kWidth) {
    const Vec p = exp_v(load(row + c) - base);
    store(row + c, p);
    total += p;
  }
  const float factor = after == before ? 1.0f : exp_v(splat(before - base))[0];
  store(sum, load(sum) * factor + total);
  *max = after;
  return factor;
}

// The values of one block where they lie, if they are fp32 in whole vectors; null if they must be converted.
VAR_INLINE const float* values_in_place(const float* values, int64_t dim) { return dim % kWidth ? nullptr : values; }
template <class T>
VAR_INLINE const float* values_in_place(const T*, int64_t) {
  return nullptr;
}

// O (rows, padded) += P V. Rows that see equally many keys share one product, so that an invisible value is never
// multiplied, not even by 0: 0 · NaN would carry a later scale into an earlier one.
void add_values(const int64_t* visible, int64_t rows, int64_t key_begin, int64_t columns, int64_t padded,
                const float* p, const float* values, int64_t values_row, float* out) {
  for (int64_t r = 0, end; r < rows; r = end) {
    const int64_t seen = seen_in_block(visible[r], key_begin, columns);
    for (end = r + 1; end < rows && seen_in_block(visible[end], key_begin, columns) == seen;) ++end;
    if (seen > 0)
      gemm(end - r, padded, seen, p + r * kScoreRow, kScoreRow, 1, values, values_row, out + r * padded, padded, true);
  }
}

template <class T>
void forward_tile(const AttentionForwardArgs& args, const AttentionForwardTask& task, int64_t head, QueryTile tile,
                  const ForwardScratch& s) {
  const AttentionProblem& p = args.problem;
  const int64_t rows = tile.end - tile.begin, padded = round_up(p.dim, kWidth);
  const int64_t* visible = p.visible + tile.begin;
  const int64_t keys = visible[rows - 1];
  const bool few = few_rows(tile);
  load_rows(row_of<const T>(args.q, task.batch, head, tile.begin), args.q.row, rows, p.dim, p.softmax_scale, s.queries,
            padded);
  memset(s.out, 0, rows * padded * sizeof(float));
  memset(s.sum, 0, rows * kWidth * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) s.max[r] = -kInfinity;

  for (int64_t begin = 0; begin < keys; begin += kBlock) {
    const int64_t columns = min_i(keys - begin, kBlock), whole = round_up(columns, kWidth);
    const int64_t place = streams(task) ? 0 : begin;
    const float* values = nullptr;
    if (few) {
      dot_keys<T>(args, task, begin, columns, rows, s.queries, s.scores);
      values = values_in_place(row_of<const T>(args.v, task.batch, task.kv_head, begin), p.dim);
    } else {
      if (streams(task)) pack_keys<T>(args, task, begin, begin + columns, s.keys);
      multiply_strips(rows, columns, p.dim, s.queries, padded, s.keys + place * p.dim, s.scores);
    }
    const int64_t values_row = values ? args.v.row : padded;
    if (!values) {
      values = s.values + place * padded;
      if (streams(task)) pack_values<T>(args, task, begin, begin + columns, s.values);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* row = s.scores + r * kScoreRow;
      hide(row, seen_in_block(visible[r], begin, columns), whole, -kInfinity);
      const float factor = online_softmax(row, whole, s.max + r, s.sum + r * kWidth);
      if (factor != 1.0f)
        for (int64_t d = 0; d < padded; d += kWidth) store(s.out + r * padded + d, load(s.out + r * padded + d) * factor);
    }
    add_values(visible, rows, begin, columns, padded, s.scores, values, values_row, s.out);
  }

  float* lse = args.lse + (task.batch * p.heads + head) * p.queries + tile.begin;
  for (int64_t r = 0; r < rows; ++r) {
    const float sum = reduce_add(load(s.sum + r * kWidth));
    store_rows(s.out + r * padded, padded, 1, p.dim, 1.0f / sum,
               row_of<T>(args.out, task.batch, head, tile.begin + r), args.out.row);
    lse[r] = s.max[r] + __builtin_logf(sum);
  }
}

template <class T>
void forward(const AttentionForwardArgs& args, const AttentionForwardTask& task, float* scratch) {
  const AttentionProblem& p = args.problem;
  const ForwardScratch s = carve(p, task, scratch);
  if (!streams(task)) {
    int64_t keys = 0, values = 0;
    for (int64_t unit = task.unit_begin; unit < task.unit_end; ++unit) {
      const QueryTile tile = p.tiles[unit % p.tile_count];
      values = max_i(values, p.visible[tile.end - 1]);
      if (!few_rows(tile)) keys = max_i(keys, p.visible[tile.end - 1]);
    }
    pack_keys<T>(args, task, 0, keys, s.keys);
    pack_values<T>(args, task, 0, values, s.values);
  }
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t unit = task.unit_begin; unit < task.unit_end; ++unit)
    forward_tile<T>(args, task, task.kv_head * group + unit / p.tile_count, p.tiles[unit % p.tile_count], s);
}

}  // namespace

extern const AttentionForward attention_forward = {scratch_size, {forward<float>, forward<bf16>, forward<fp16>}};

}  // namespace var_kernels::VAR_ISA
