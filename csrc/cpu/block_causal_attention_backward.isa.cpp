// The backward of block_causal_attention. It recomputes probabilities from the log-sum-exp, tile by tile, so nothing of
// size L x L is kept.
//
//   P = exp(softmax_scale · S − lse),   dP = V dOᵀ,   δ = rowsum(dO ∘ out) − dlse,   dS = P ∘ (dP − δ)
//   dV += P dO,   dK += dS (softmax_scale · Q),   dQᵀ = softmax_scale · Σ Kᵀ dS       (S, P, dP, dS: keys by rows)
//
// A task owns a range of keys: dK and dV of the range are summed in fp32 over all query tiles that see it, in order.
// The shapes determine the ranges, never the number of threads, and each range writes its own share of dQ. The
// arithmetic is fp32. With AVX512-BF16, bf16 inputs are multiplied as pairs, and P and dS are rounded to bf16.
#include "block_causal_attention_pairs.h"

namespace var_kernels::VAR_ISA {
namespace {

constexpr int64_t kBlock = 64;  // keys per step; every range starts at a multiple of it

template <class T>
VAR_INLINE float dot(const T* a, const T* b, int64_t dim) {
  const int64_t whole = dim / kWidth * kWidth;
  Vec sum{};
  for (int64_t d = 0; d < whole; d += kWidth) sum += load(a + d) * load(b + d);
  if (whole < dim) sum += load_tail(a + whole, dim - whole) * load_tail(b + whole, dim - whole);
  return reduce_add(sum);
}

// Loads lse and δ of one tile. Lanes without a row get lse = inf, which makes their P and dS zero.
template <class T>
void load_statistics(const AttentionBackwardArgs& args, int64_t batch, int64_t head, QueryTile tile, int64_t lanes,
                     float lse_factor, float* lse, float* delta) {
  const AttentionProblem& p = args.problem;
  const int64_t rows = tile.end - tile.begin, first = (batch * p.heads + head) * p.queries + tile.begin;
  for (int64_t r = 0; r < rows; ++r) {
    lse[r] = args.lse[first + r] * lse_factor;
    delta[r] = dot(row_of<const T>(args.dout, batch, head, tile.begin + r),
                   row_of<const T>(args.out, batch, head, tile.begin + r), p.dim) -
               (args.dlse ? args.dlse[first + r] : 0.0f);
  }
  fill(lse + rows, lanes - rows, kInfinity);
  fill(delta + rows, lanes - rows, 0.0f);
}

// Overwrites S and dP of the keys [begin, end) of a block where a query row does not see the key. P and dS are then 0,
// whatever K and V contain there.
VAR_INLINE void hide(const int64_t* visible, int64_t rows, int64_t block, int64_t begin, int64_t end, int64_t lanes,
                     float* scores, float* dp) {
  for (int64_t key = max_i(begin, visible[0] - block); key < end; ++key) {
    const int64_t hidden = first_row_beyond(visible, rows, block + key);
    fill(scores + (key - begin) * lanes, hidden, -kInfinity);
    fill(dp + (key - begin) * lanes, hidden, 0.0f);
  }
}

// ---- operands: fp32 ---------------------------------------------------------------------------------------------

template <class T>
struct Operands {
  static constexpr int64_t kTileRows = kMaxTileRows, kUnit = kTileUnit;
  int64_t dim, padded;
  float *keys, *values, *dk, *dv;                        // (keys, padded)
  float *queries, *dout, *query_columns, *dout_columns;  // (rows, padded); [dim][lanes]; queries times softmax_scale
  float *dq;                                             // [padded][lanes]
  float *scores, *dp, *lse, *delta;                      // (kBlock, lanes), (lanes)
  float lse_factor = 1.0f, dk_factor = 1.0f, softmax_scale;

  Operands(Scratch& scratch, const AttentionProblem& p, int64_t count)
      : dim(p.dim), padded(round_up(p.dim, kWidth)), softmax_scale(p.softmax_scale) {
    for (float** memory : {&keys, &values, &dk, &dv}) *memory = scratch.take(count * padded);
    for (float** memory : {&queries, &dout, &query_columns, &dout_columns, &dq})
      *memory = scratch.take(kTileRows * padded);
    for (float** memory : {&scores, &dp}) *memory = scratch.take(kTileRows * kBlock);
    for (float** memory : {&lse, &delta}) *memory = scratch.take(kTileRows);
  }
  void load_keys(const T* k, int64_t k_row, const T* v, int64_t v_row, int64_t count) {
    load_rows(k, k_row, count, dim, 1.0f, keys, padded);
    load_rows(v, v_row, count, dim, 1.0f, values, padded);
  }
  void load_tile(const T* q, int64_t q_row, const T* d, int64_t d_row, int64_t rows, int64_t lanes) {
    load_rows(q, q_row, rows, dim, softmax_scale, queries, padded);
    load_rows(d, d_row, rows, dim, 1.0f, dout, padded);
    load_transposed(queries, padded, rows, dim, 1.0f, query_columns, lanes);
    load_transposed(dout, padded, rows, dim, 1.0f, dout_columns, lanes);
  }
  // Adds the gradients of `columns` keys: key `block` of all keys is the first one, at `place` in the range of the
  // task.
  void add_block(const int64_t* visible, int64_t rows, int64_t lanes, int64_t block, int64_t place, int64_t columns) {
    multiply_rows(columns, lanes, dim, keys + place * padded, padded, query_columns, scores);
    multiply_rows(columns, lanes, dim, values + place * padded, padded, dout_columns, dp);
    hide(visible, rows, block, 0, columns, lanes, scores, dp);
    for (int64_t i = 0; i < columns * lanes; i += lanes)
      for (int64_t r = 0; r < lanes; r += kWidth) {
        // log2 e multiplies the difference, not its two terms: where P is large the difference is small, and so is the
        // error of this rounding.
        const Vec p = exp2_v((load(scores + i + r) - load(lse + r)) * kLog2E);
        store(scores + i + r, p);
        store(dp + i + r, p * (load(dp + i + r) - load(delta + r)));
      }
    gemm(columns, padded, rows, scores, lanes, 1, dout, padded, dv + place * padded, padded, true);
    gemm(columns, padded, rows, dp, lanes, 1, queries, padded, dk + place * padded, padded, true);
    gemm(dim, lanes, columns, keys + place * padded, 1, padded, dp, lanes, dq, lanes, true);
  }
};

// ---- operands: pairs of bf16 ------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
template <>
struct Operands<bf16> {
  static constexpr int64_t kTileRows = 96, kUnit = kStep;  // sums over rows go in whole steps
  using KeyColumns = TransposedBlocks<kBlock>;
  int64_t dim, padded, words;  // padded: dim rounded up to 16; words: pairs of a row, up to whole steps
  Pair *keys, *values, *key_columns;                            // (keys, words); blocks of (padded, keys)
  float *dk, *dv;                                               // (keys, padded)
  Pair *query_columns, *dout_columns, *query_pairs, *dout_pairs;  // [words][lanes]; [lanes / 2][padded]
  float* dq;                                                    // [padded][lanes]
  float *scores, *dp;                                           // two chunks of (16, lanes)
  bf16 *p, *ds;                                                 // (kBlock, lanes)
  Pair *ds_pairs, *step_copy;                                   // [kBlock / 2][lanes]
  float *lse, *delta;
  float softmax_scale, dk_factor, lse_factor = kLog2E;

  Operands(Scratch& scratch, const AttentionProblem& problem, int64_t count)
      : dim(problem.dim), padded(round_up(dim, 16)), words(round_up(dim, kStep) / 2),
        softmax_scale(problem.softmax_scale), dk_factor(problem.softmax_scale) {
    for (Pair** memory : {&keys, &values}) *memory = scratch.take_pairs(count * words);
    key_columns = scratch.take_pairs(KeyColumns::words(count, dim));
    for (float** memory : {&dk, &dv}) *memory = scratch.take(count * padded);
    for (Pair** memory : {&query_columns, &dout_columns}) *memory = scratch.take_pairs(words * kTileRows);
    for (Pair** memory : {&query_pairs, &dout_pairs}) *memory = scratch.take_pairs(kTileRows / 2 * padded);
    dq = scratch.take(padded * kTileRows);
    for (float** memory : {&scores, &dp}) *memory = scratch.take(2 * 16 * kTileRows);
    for (bf16** memory : {&p, &ds}) *memory = reinterpret_cast<bf16*>(scratch.take_pairs(kBlock / 2 * kTileRows));
    ds_pairs = scratch.take_pairs(kBlock / 2 * kTileRows);
    step_copy = scratch.take_pairs(padded * kStep / 2);
    for (float** memory : {&lse, &delta}) *memory = scratch.take(kTileRows);
  }
  void load_keys(const bf16* k, int64_t k_row, const bf16* v, int64_t v_row, int64_t count) {
    copy_rows(k, k_row, count, dim, keys);
    copy_rows(v, v_row, count, dim, values);
    KeyColumns::pack(k, k_row, count, dim, key_columns);
  }
  void load_tile(const bf16* q, int64_t q_row, const bf16* d, int64_t d_row, int64_t rows, int64_t lanes) {
    load_pairs_transposed(q, q_row, rows, dim, 0, query_columns, lanes);
    load_pairs_transposed(d, d_row, rows, dim, 0, dout_columns, lanes);
    load_row_pairs(q, q_row, rows, dim, query_pairs);
    load_row_pairs(d, d_row, rows, dim, dout_pairs);
  }

  // Computes S and dP of the 16 keys from `place` on, into the first (slot 0) or second (slot 1) chunk of memory.
  void multiply_keys(int64_t place, int64_t lanes, int64_t slot) const {
    const int64_t at = slot * 16 * lanes;
    gemm(16, lanes, words, keys + place * words, words, 1, query_columns, lanes, scores + at, lanes, false);
    gemm(16, lanes, words, values + place * words, words, 1, dout_columns, lanes, dp + at, lanes, false);
  }
  // Computes P and dS of two keys (rows i and i + 1 of the scores) in 32 lanes. Both are stored by rows, and dS also as
  // pairs of keys.
  VAR_INLINE void softmax_backward(const float* s, const float* g, int64_t lanes, Vec factor, int64_t r, bf16* p_row,
                                   bf16* ds_row, Pair* pairs) const {
    __m512i ds_rows[2];
    for (int64_t i = 0; i < 2; ++i) {
      Vec probability[2], gradient[2];
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t lane = r + j * kWidth;
        probability[j] = exp2_v<3>(load(s + i * lanes + lane) * factor - load(lse + lane));
        gradient[j] = probability[j] * (load(g + i * lanes + lane) - load(delta + lane));
      }
      ds_rows[i] = (__m512i)_mm512_cvtne2ps_pbh((__m512)gradient[1], (__m512)gradient[0]);
      const auto rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)probability[1], (__m512)probability[0]);
      _mm512_storeu_si512(p_row + i * lanes + r, rounded);
      _mm512_storeu_si512(ds_row + i * lanes + r, ds_rows[i]);
    }
    alignas(64) static constexpr uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(pairs + r, _mm512_permutex2var_epi16(ds_rows[0], low, ds_rows[1]));
    _mm512_storeu_si512(pairs + r + kWidth, _mm512_permutex2var_epi16(ds_rows[0], high, ds_rows[1]));
  }

  void add_block(const int64_t* visible, int64_t rows, int64_t lanes, int64_t block, int64_t place, int64_t columns) {
    const int64_t chunks = (columns + 15) / 16, whole = chunks * 16;
    const Vec factor = splat(softmax_scale * kLog2E);
    multiply_keys(place, lanes, 0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks) multiply_keys(place + (chunk + 1) * 16, lanes, (chunk + 1) % 2);
      const int64_t begin = chunk * 16, at = chunk % 2 * 16 * lanes;
      float *s = scores + at, *g = dp + at;
      hide(visible, rows, block, begin, min_i(begin + 16, columns), lanes, s, g);
      for (int64_t key = columns; key < begin + 16; ++key) {  // keys that no row of this tile sees, or that don't exist
        fill(s + (key - begin) * lanes, lanes, -kInfinity);
        fill(g + (key - begin) * lanes, lanes, 0.0f);
      }
      for (int64_t i = 0; i < 16; i += 2)
        for (int64_t r = 0; r < lanes; r += 2 * kWidth)
          softmax_backward(s + i * lanes, g + i * lanes, lanes, factor, r, p + (begin + i) * lanes,
                           ds + (begin + i) * lanes, ds_pairs + (begin + i) / 2 * lanes);
    }
    memset(ds_pairs + whole / 2 * lanes, 0, (round_up(whole, kStep) - whole) / 2 * lanes * sizeof(Pair));
    const auto pairs = [](const bf16* rows) { return reinterpret_cast<const Pair*>(rows); };
    gemm(whole, padded, lanes / 2, pairs(p), lanes / 2, 1, dout_pairs, padded, dv + place * padded, padded, true);
    gemm(whole, padded, lanes / 2, pairs(ds), lanes / 2, 1, query_pairs, padded, dk + place * padded, padded, true);
    KeyColumns::multiply(key_columns + place / 2 * padded, dim, 0, columns, ds_pairs, lanes, step_copy, dq);
  }
};
#endif

// ---- one task ---------------------------------------------------------------------------------------------------

template <class T>
Operands<T> carve(const AttentionProblem& p, const AttentionBackwardTask& task, Scratch& scratch) {
  return Operands<T>(scratch, p, round_up(task.key_end - task.key_begin, kBlock));
}

template <class T>
int64_t scratch_size(const AttentionProblem& problem, const AttentionBackwardTask& task) {
  Scratch scratch{nullptr};
  carve<T>(problem, task, scratch);
  return scratch.taken;
}

template <class T>
void backward(const AttentionBackwardArgs& args, const AttentionBackwardTask& task, float* memory) {
  const AttentionProblem& p = args.problem;
  Scratch scratch{memory};
  Operands<T> s = carve<T>(p, task, scratch);
  const int64_t share_row = round_up(p.dim, kWidth), keys = task.key_end - task.key_begin;
  const auto rows_at = [&task](const HeadRows& x) { return row_of<T>(x, task.batch, task.kv_head, task.key_begin); };
  s.load_keys(rows_at(args.k), args.k.row, rows_at(args.v), args.v.row, keys);
  memset(s.dk, 0, round_up(keys, 16) * s.padded * sizeof(float));
  memset(s.dv, 0, round_up(keys, 16) * s.padded * sizeof(float));
  alignas(64) float scales[Operands<T>::kTileRows];
  fill(scales, Operands<T>::kTileRows, p.softmax_scale);

  const TileUnit unit_is_ready;
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t unit = 0; unit < group * p.tile_count; ++unit) {
    const int64_t head = task.kv_head * group + unit / p.tile_count;
    const QueryTile tile = p.tiles[unit % p.tile_count];
    const int64_t rows = tile.end - tile.begin, lanes = round_up(rows, Operands<T>::kUnit);
    const int64_t* visible = p.visible + tile.begin;
    float* share = task.dq_part ? task.dq_part + (unit / p.tile_count * p.queries + tile.begin) * share_row : nullptr;
    if (visible[rows - 1] <= task.key_begin) {  // not in the range of key 0, so the share exists
      memset(share, 0, rows * share_row * sizeof(float));
      continue;
    }
    s.load_tile(row_of<const T>(args.q, task.batch, head, tile.begin), args.q.row,
                row_of<const T>(args.dout, task.batch, head, tile.begin), args.dout.row, rows, lanes);
    load_statistics<T>(args, task.batch, head, tile, lanes, s.lse_factor, s.lse, s.delta);
    memset(s.dq, 0, round_up(p.dim, 16) * lanes * sizeof(float));
    const int64_t end = min_i(visible[rows - 1], task.key_end);
    for (int64_t begin = task.key_begin; begin < end; begin += kBlock)
      s.add_block(visible, rows, lanes, begin, begin - task.key_begin, min_i(end - begin, kBlock));
    if (share)
      store_transposed(s.dq, lanes, rows, p.dim, scales, share, share_row);
    else
      store_transposed(s.dq, lanes, rows, p.dim, scales, row_of<T>(args.dq, task.batch, head, tile.begin), args.dq.row);
  }
  store_rows(s.dk, s.padded, keys, p.dim, s.dk_factor, rows_at(args.dk), args.dk.row);
  store_rows(s.dv, s.padded, keys, p.dim, 1.0f, rows_at(args.dv), args.dv.row);
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
    {Operands<float>::kTileRows, Operands<bf16>::kTileRows, Operands<fp16>::kTileRows},
    {Operands<float>::kUnit, Operands<bf16>::kUnit, Operands<fp16>::kUnit},
    {scratch_size<float>, scratch_size<bf16>, scratch_size<fp16>},
    padded_dim,
    {backward<float>, backward<bf16>, backward<fp16>},
    {sum_parts<float>, sum_parts<bf16>, sum_parts<fp16>},
};

}  // namespace var_kernels::VAR_ISA
