// Forward: for a tile of query rows, one pass over the visible keys with the softmax computed online.
//
//   scores = softmax_scale · Q Kᵀ,   m = running row maximum,   P = exp(scores − m),   O = Σ P V,   l = Σ P
//
// When a later block raises m, O and l are multiplied by exp(m_old − m_new). At the end out = O / l, lse = m + log l.
// All operands are fp32 in cache: K as transposed strips and V as rows, converted once per task, Q once per tile.
#include "block_causal_attention_tile.h"

namespace var_kernels::VAR_ISA {
namespace {

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

ForwardScratch carve(const AttentionProblem& p, const AttentionForwardTask& task, float* base) {
  const int64_t padded = round_up(p.dim, kWidth), keys = streams(task) ? kBlock : round_up(p.keys, kBlock);
  float* next = base;
  const auto take = [&next](int64_t floats) {
    float* taken = next;
    next += round_up(floats, 16);
    return taken;
  };
  ForwardScratch s;
  s.keys = take(keys * p.dim);
  s.values = take(keys * padded);
  s.queries = take(kMaxTileRows * padded);
  s.scores = take(kMaxTileRows * kScoreRow);
  s.out = take(kMaxTileRows * padded);
  s.sum = take(kMaxTileRows * kWidth);
  s.max = take(kMaxTileRows);
  s.size = next - base;
  return s;
}

int64_t scratch_size(const AttentionProblem& problem, const AttentionForwardTask& task) {
  return carve(problem, task, nullptr).size;
}

// Convert the keys [begin, end) of one block, end - begin <= kBlock.
template <class T>
void pack_block(const AttentionForwardArgs& args, const AttentionForwardTask& task, int64_t begin, int64_t end,
                float* keys, float* values) {
  const AttentionProblem& p = args.problem;
  for (int64_t key = begin; key < end; key += kStrip)
    pack_strip(row_of<const T>(args.k, task.batch, task.kv_head, key), args.k.row, min_i(end - key, kStrip), p.dim,
               keys + (key - begin) * p.dim);
  load_rows(row_of<const T>(args.v, task.batch, task.kv_head, begin), args.v.row, end - begin, p.dim, 1.0f, values,
            round_up(p.dim, kWidth));
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

// O (rows, padded) += P V. Rows that see equally many keys share one product, so that an invisible value is never
// multiplied, not even by 0: 0 · NaN would carry a later scale into an earlier one.
void add_values(const int64_t* visible, int64_t rows, int64_t key_begin, int64_t columns, int64_t padded,
                const float* p, const float* values, float* out) {
  for (int64_t r = 0, end; r < rows; r = end) {
    const int64_t seen = seen_in_block(visible[r], key_begin, columns);
    for (end = r + 1; end < rows && seen_in_block(visible[end], key_begin, columns) == seen;) ++end;
    if (seen > 0)
      gemm(end - r, padded, seen, p + r * kScoreRow, kScoreRow, 1, values, padded, out + r * padded, padded, true);
  }
}

template <class T>
void forward_tile(const AttentionForwardArgs& args, const AttentionForwardTask& task, int64_t head, QueryTile tile,
                  const ForwardScratch& s) {
  const AttentionProblem& p = args.problem;
  const int64_t rows = tile.end - tile.begin, padded = round_up(p.dim, kWidth);
  const int64_t* visible = p.visible + tile.begin;
  const int64_t keys = visible[rows - 1];
  load_rows(row_of<const T>(args.q, task.batch, head, tile.begin), args.q.row, rows, p.dim, p.softmax_scale, s.queries,
            padded);
  memset(s.out, 0, rows * padded * sizeof(float));
  memset(s.sum, 0, rows * kWidth * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) s.max[r] = -kInfinity;

  for (int64_t begin = 0; begin < keys; begin += kBlock) {
    const int64_t columns = min_i(keys - begin, kBlock), whole = round_up(columns, kWidth);
    const int64_t place = streams(task) ? 0 : begin;
    if (streams(task)) pack_block<T>(args, task, begin, begin + columns, s.keys, s.values);
    multiply_strips(rows, columns, p.dim, s.queries, padded, s.keys + place * p.dim, s.scores);
    for (int64_t r = 0; r < rows; ++r) {
      float* row = s.scores + r * kScoreRow;
      hide(row, seen_in_block(visible[r], begin, columns), whole, -kInfinity);
      const float factor = online_softmax(row, whole, s.max + r, s.sum + r * kWidth);
      if (factor != 1.0f)
        for (int64_t d = 0; d < padded; d += kWidth) store(s.out + r * padded + d, load(s.out + r * padded + d) * factor);
    }
    add_values(visible, rows, begin, columns, padded, s.scores, s.values + place * padded, s.out);
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
    int64_t keys = 0;
    for (int64_t unit = task.unit_begin; unit < task.unit_end; ++unit)
      keys = max_i(keys, p.visible[p.tiles[unit % p.tile_count].end - 1]);
    for (int64_t key = 0; key < keys; key += kBlock)
      pack_block<T>(args, task, key, min_i(key + kBlock, keys), s.keys + key * p.dim,
                    s.values + key * round_up(p.dim, kWidth));
  }
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t unit = task.unit_begin; unit < task.unit_end; ++unit)
    forward_tile<T>(args, task, task.kv_head * group + unit / p.tile_count, p.tiles[unit % p.tile_count], s);
}

}  // namespace

extern const AttentionForward attention_forward = {scratch_size, {forward<float>, forward<bf16>, forward<fp16>}};

}  // namespace var_kernels::VAR_ISA
