// Backward: probabilities are recomputed from the log-sum-exp, tile by tile, so nothing of size L x L is kept.
//
//   P = exp(scores − lse),   dP = dO Vᵀ,   δ = rowsum(dO ∘ out) − dlse,   dS = P ∘ (dP − δ)
//   dV += Pᵀ dO,   dK += dSᵀ (softmax_scale · Q),   dQ = softmax_scale · Σ dS K
//
// A task owns a range of keys: dK and dV of the range are summed in fp32 over all query tiles that see it, in order.
// The ranges are fixed by the shapes, never by the number of threads; each writes its own share of dQ.
#include "block_causal_attention_tile.h"

namespace var_kernels::VAR_ISA {
namespace {

struct BackwardScratch {
  float *key_strips, *value_strips;           // strips [D][kStrip]
  float *keys, *dk, *dv;                      // (keys, padded D)
  float *queries, *dout, *dq;                 // (rows, padded D); queries times softmax_scale
  float *p, *ds;                              // (rows, kScoreRow)
  float *lse, *delta;                         // (rows)
  int64_t size;
};

BackwardScratch carve(const AttentionProblem& p, const AttentionBackwardTask& task, float* base) {
  const int64_t padded = round_up(p.dim, kWidth), keys = round_up(task.key_end - task.key_begin, kBlock);
  int64_t taken = 0;
  const auto take = [&taken, base](int64_t floats) {
    float* memory = base ? base + taken : nullptr;  // without memory only the size is wanted
    taken += round_up(floats, 16);
    return memory;
  };
  BackwardScratch s;
  s.key_strips = take(keys * p.dim);
  s.value_strips = take(keys * p.dim);
  s.keys = take(keys * padded);
  s.dk = take(keys * padded);
  s.dv = take(keys * padded);
  s.queries = take(kMaxTileRows * padded);
  s.dout = take(kMaxTileRows * padded);
  s.dq = take(kMaxTileRows * padded);
  s.p = take(kMaxTileRows * kScoreRow);
  s.ds = take(kMaxTileRows * kScoreRow);
  s.lse = take(kMaxTileRows);
  s.delta = take(kMaxTileRows);
  s.size = taken;
  return s;
}

int64_t scratch_size(const AttentionProblem& problem, const AttentionBackwardTask& task) {
  return carve(problem, task, nullptr).size;
}

template <class T>
VAR_INLINE float dot(const float* a, const T* b, int64_t dim) {
  const int64_t whole = dim / kWidth * kWidth;
  Vec sum{};
  for (int64_t d = 0; d < whole; d += kWidth) sum += load(a + d) * load(b + d);
  if (whole < dim) sum += load(a + whole) * load_tail(b + whole, dim - whole);
  return reduce_add(sum);
}

// Q, dO, lse and δ of one tile.
template <class T>
void load_tile(const AttentionBackwardArgs& args, int64_t batch, int64_t head, QueryTile tile,
               const BackwardScratch& s) {
  const AttentionProblem& p = args.problem;
  const int64_t rows = tile.end - tile.begin, padded = round_up(p.dim, kWidth);
  const int64_t first = (batch * p.heads + head) * p.queries + tile.begin;
  load_rows(row_of<const T>(args.q, batch, head, tile.begin), args.q.row, rows, p.dim, p.softmax_scale, s.queries,
            padded);
  load_rows(row_of<const T>(args.dout, batch, head, tile.begin), args.dout.row, rows, p.dim, 1.0f, s.dout, padded);
  for (int64_t r = 0; r < rows; ++r) {
    s.lse[r] = args.lse[first + r];
    s.delta[r] = dot(s.dout + r * padded, row_of<const T>(args.out, batch, head, tile.begin + r), p.dim) -
                 (args.dlse ? args.dlse[first + r] : 0.0f);
  }
}

// scores -> P and dP -> dS, zero where the row does not see the key.
VAR_INLINE void softmax_backward(float* p, float* ds, int64_t columns, int64_t seen, float lse, float delta) {
  for (int64_t c = 0; c < columns; c += kWidth) {
    const Vec probability = exp_v(load(p + c) - lse);
    store(p + c, probability);
    store(ds + c, probability * (load(ds + c) - delta));
  }
  hide(p, seen, columns, 0.0f);
  hide(ds, seen, columns, 0.0f);
}

// One tile of queries against the part of its visible keys that lies in the task's range.
void backward_tile(const AttentionProblem& p, const AttentionBackwardTask& task, QueryTile tile,
                   const BackwardScratch& s) {
  const int64_t rows = tile.end - tile.begin, padded = round_up(p.dim, kWidth);
  const int64_t* visible = p.visible + tile.begin;
  const int64_t keys = min_i(visible[rows - 1], task.key_end);
  memset(s.dq, 0, rows * padded * sizeof(float));
  for (int64_t begin = task.key_begin; begin < keys; begin += kBlock) {
    const int64_t columns = min_i(keys - begin, kBlock), whole = round_up(columns, kWidth);
    const int64_t place = begin - task.key_begin;
    multiply_strips(rows, columns, p.dim, s.queries, padded, s.key_strips + place * p.dim, s.p);
    multiply_strips(rows, columns, p.dim, s.dout, padded, s.value_strips + place * p.dim, s.ds);
    for (int64_t r = 0; r < rows; ++r)
      softmax_backward(s.p + r * kScoreRow, s.ds + r * kScoreRow, whole, seen_in_block(visible[r], begin, columns),
                       s.lse[r], s.delta[r]);
    gemm(columns, padded, rows, s.p, 1, kScoreRow, s.dout, padded, s.dv + place * padded, padded, true);
    gemm(columns, padded, rows, s.ds, 1, kScoreRow, s.queries, padded, s.dk + place * padded, padded, true);
    gemm(rows, padded, columns, s.ds, kScoreRow, 1, s.keys + place * padded, padded, s.dq, padded, true);
  }
}

template <class T>
void backward(const AttentionBackwardArgs& args, const AttentionBackwardTask& task, float* scratch) {
  const AttentionProblem& p = args.problem;
  const BackwardScratch s = carve(p, task, scratch);
  const int64_t padded = round_up(p.dim, kWidth), keys = task.key_end - task.key_begin;
  const auto rows_at = [&task](const HeadRows& x, int64_t key) {
    return row_of<T>(x, task.batch, task.kv_head, task.key_begin + key);
  };
  for (int64_t key = 0; key < keys; key += kStrip) {
    const int64_t count = min_i(keys - key, kStrip);
    pack_strip<T>(rows_at(args.k, key), args.k.row, count, p.dim, s.key_strips + key * p.dim);
    pack_strip<T>(rows_at(args.v, key), args.v.row, count, p.dim, s.value_strips + key * p.dim);
  }
  load_rows<T>(rows_at(args.k, 0), args.k.row, keys, p.dim, 1.0f, s.keys, padded);
  memset(s.dk, 0, keys * padded * sizeof(float));
  memset(s.dv, 0, keys * padded * sizeof(float));

  const int64_t group = p.heads / p.kv_heads;
  for (int64_t unit = 0; unit < group * p.tile_count; ++unit) {
    const int64_t head = task.kv_head * group + unit / p.tile_count;
    const QueryTile tile = p.tiles[unit % p.tile_count];
    const int64_t rows = tile.end - tile.begin;
    float* share = task.dq_part ? task.dq_part + (unit / p.tile_count * p.queries + tile.begin) * padded : nullptr;
    if (p.visible[tile.end - 1] <= task.key_begin) {  // never in the range that starts at key 0
      memset(share, 0, rows * padded * sizeof(float));
      continue;
    }
    load_tile<T>(args, task.batch, head, tile, s);
    backward_tile(p, task, tile, s);
    if (share)
      store_rows(s.dq, padded, rows, padded, p.softmax_scale, share, padded);
    else
      store_rows(s.dq, padded, rows, p.dim, p.softmax_scale, row_of<T>(args.dq, task.batch, head, tile.begin),
                 args.dq.row);
  }
  store_rows(s.dk, padded, keys, p.dim, 1.0f, rows_at(args.dk, 0), args.dk.row);
  store_rows(s.dv, padded, keys, p.dim, 1.0f, rows_at(args.dv, 0), args.dv.row);
}

template <class T>
void sum_parts(const AttentionBackwardArgs& args, int64_t batch, int64_t head, int64_t begin, int64_t end,
               const float* part, int64_t part_stride, int64_t parts) {
  const int64_t dim = args.problem.dim, padded = round_up(dim, kWidth);
  for (int64_t row = begin; row < end; ++row) {
    T* dst = row_of<T>(args.dq, batch, head, row);
    for (int64_t d = 0; d < dim; d += kWidth) {
      const float* src = part + row * padded + d;
      Vec sum = load(src);
      for (int64_t i = 1; i < parts; ++i) sum += load(src + i * part_stride);
      if (dim - d >= kWidth)
        store(dst + d, sum);
      else
        store_tail(dst + d, sum, dim - d);
    }
  }
}

int64_t padded_dim(int64_t dim) { return round_up(dim, kWidth); }

}  // namespace

extern const AttentionBackward attention_backward = {
    scratch_size,
    padded_dim,
    {backward<float>, backward<bf16>, backward<fp16>},
    {sum_parts<float>, sum_parts<bf16>, sum_parts<fp16>},
};

}  // namespace var_kernels::VAR_ISA
