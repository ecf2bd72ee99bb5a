// The forward of block_causal_attention for a few query rows (the first scales against their cache), too few to fill
// the lanes of a vector. Each row and key take one dot product, and K and V are read where they are, so that nothing is
// packed for a single use.
#pragma once
#include "block_causal_attention_tile.h"

namespace var_kernels::VAR_ISA {

constexpr int64_t kFewRows = 8;  // the largest number of rows; with AMX tiles are faster from 5 rows on
constexpr int64_t kFewGroup = 4;  // rows that share each value that is read of V, in registers
constexpr int64_t kFewBlock = 256;  // keys per step of the online softmax

struct FewRowsScratch {
  float* queries;  // (rows, padded D), times softmax_scale
  float* scores;   // (rows, kFewBlock)
  float* out;      // (rows, padded D), relative to the running maximum

  FewRowsScratch(Scratch& scratch, int64_t dim)
      : queries(scratch.take(kFewRows * round_up(dim, kWidth))),
        scores(scratch.take(kFewRows * kFewBlock)),
        out(scratch.take(kFewRows * round_up(dim, kWidth))) {}
};

// Adds up the lanes of kWidth accumulators, by a transposition that adds at every step. Lane i of the result holds the
// sum of accumulator i.
template <int Step>
VAR_INLINE Vec reduce_each(Vec (&acc)[kWidth]) {
  for (int i = 0; i < Step; ++i) {
    exchange<Step>(acc[i], acc[i + Step], std::make_integer_sequence<int, kWidth>());
    acc[i] += acc[i + Step];
  }
  if constexpr (Step > 1) return reduce_each<Step / 2>(acc);
  return acc[0];
}

// scores (rows, columns up to the next whole vector) = queries · keys. Columns beyond the last key repeat the last key.
template <class T>
void dot_keys(const T* keys, int64_t key_row, int64_t columns, int64_t rows, int64_t dim, const float* queries,
              float* scores) {
  const int64_t padded = round_up(dim, kWidth), whole = dim / kWidth * kWidth;
  for (int64_t c = 0; c < columns; c += kWidth) {
    const T* at[kWidth];
    for (int i = 0; i < kWidth; ++i) at[i] = keys + min_i(c + i, columns - 1) * key_row;
    for (int64_t r = 0; r < rows; ++r) {
      Vec acc[kWidth] = {};
      for (int64_t d = 0; d < whole; d += kWidth) {
        const Vec q = load(queries + r * padded + d);
        for (int i = 0; i < kWidth; ++i) acc[i] += load(at[i] + d) * q;
      }
      if (whole < dim) {
        const Vec q = load(queries + r * padded + whole);
        for (int i = 0; i < kWidth; ++i) acc[i] += load_tail(at[i] + whole, dim - whole) * q;
      }
      store(scores + r * kFewBlock + c, reduce_each<kWidth / 2>(acc));
    }
  }
}

// The online softmax of one row and one block: turns scores into P, and updates the running maximum and sum. Returns
// the factor by which the row of O must be multiplied.
VAR_INLINE float online_softmax(float* row, int64_t seen, float* max, float* sum) {
  for (int64_t c = seen; c % kWidth; ++c) row[c] = -kInfinity;
  Vec top = splat(-kInfinity);
  for (int64_t c = 0; c < seen; c += kWidth) top = max_v(load(row + c), top);
  const float before = *max, block = reduce_max(top), after = block > before ? block : before;
  const float base = after == -kInfinity ? 0.0f : after;  // P must be 0 here, and -inf − -inf would be NaN
  Vec total{};
  for (int64_t c = 0; c < seen; c += kWidth) {
    const Vec p = exp2_v((load(row + c) - base) * kLog2E);
    store(row + c, p);
    total += p;
  }
  const float factor = after == before ? 1.0f : exp2_v(splat((before - base) * kLog2E))[0];
  *sum = *sum * factor + reduce_add(total);
  *max = after;
  return factor;
}

// out (R, padded) = factor · out + p (R, seen) · values. No invisible value is read.
template <int R, class T>
VAR_INLINE void add_values(const float* p, int64_t seen, const T* values, int64_t value_row, int64_t dim,
                           const float* factor, float* out) {
  const int64_t padded = round_up(dim, kWidth);
  for (int64_t d = 0; d < dim; d += kWidth) {
    const auto run = [=](auto value_at) VAR_LAMBDA {
      Vec even[R] = {}, odd[R] = {};  // two chains for each row
      int64_t key = 0;
      for (; key + 2 <= seen; key += 2) {
        const Vec v = value_at(key), w = value_at(key + 1);
        for (int r = 0; r < R; ++r) {
          even[r] += v * p[r * kFewBlock + key];
          odd[r] += w * p[r * kFewBlock + key + 1];
        }
      }
      if (key < seen)
        for (int r = 0; r < R; ++r) even[r] += value_at(key) * p[r * kFewBlock + key];
      for (int r = 0; r < R; ++r) {
        float* at = out + r * padded + d;
        store(at, load(at) * factor[r] + (even[r] + odd[r]));
      }
    };
    if (dim - d >= kWidth)
      run([=](int64_t key) VAR_LAMBDA { return load(values + key * value_row + d); });
    else
      run([=](int64_t key) VAR_LAMBDA { return load_tail(values + key * value_row + d, dim - d); });
  }
}

template <class T>
void forward_few_rows(const AttentionForwardArgs& args, int64_t batch, int64_t kv_head, int64_t head, QueryTile tile,
                      const FewRowsScratch& s) {
  const AttentionProblem& p = args.problem;
  const int64_t rows = tile.end - tile.begin, padded = round_up(p.dim, kWidth);
  const int64_t* visible = p.visible + tile.begin;
  const int64_t keys = visible[rows - 1];
  load_rows(row_of<const T>(args.q, batch, head, tile.begin), args.q.row, rows, p.dim, p.softmax_scale, s.queries,
            padded);
  memset(s.out, 0, rows * padded * sizeof(float));
  float max[kFewRows], sum[kFewRows], factor[kFewRows];
  for (int64_t r = 0; r < rows; ++r) max[r] = -kInfinity, sum[r] = 0.0f;
  for (int64_t begin = 0; begin < keys; begin += kFewBlock) {
    const int64_t columns = min_i(keys - begin, kFewBlock);
    dot_keys(row_of<const T>(args.k, batch, kv_head, begin), args.k.row, columns, rows, p.dim, s.queries, s.scores);
    const T* values = row_of<const T>(args.v, batch, kv_head, begin);
    for (int64_t r = 0, end; r < rows; r = end) {  // groups of rows that see the same number of keys
      const int64_t seen = seen_in_block(visible[r], begin, columns);
      for (end = r; end < min_i(r + kFewGroup, rows) && seen_in_block(visible[end], begin, columns) == seen; ++end)
        factor[end] = online_softmax(s.scores + end * kFewBlock, seen, max + end, sum + end);
      const float* probabilities = s.scores + r * kFewBlock;
      float* out = s.out + r * padded;
      switch (end - r) {
        case 4: add_values<4>(probabilities, seen, values, args.v.row, p.dim, factor + r, out); break;
        case 3: add_values<3>(probabilities, seen, values, args.v.row, p.dim, factor + r, out); break;
        case 2: add_values<2>(probabilities, seen, values, args.v.row, p.dim, factor + r, out); break;
        default: add_values<1>(probabilities, seen, values, args.v.row, p.dim, factor + r, out);
      }
    }
  }
  float* lse = args.lse + (batch * p.heads + head) * p.queries + tile.begin;
  for (int64_t r = 0; r < rows; ++r) {
    store_rows(s.out + r * padded, padded, 1, p.dim, 1.0f / sum[r], row_of<T>(args.out, batch, head, tile.begin + r),
               args.out.row);
    lse[r] = max[r] + log_v(splat(sum[r]))[0];
  }
}

}  // namespace var_kernels::VAR_ISA
