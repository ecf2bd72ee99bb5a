// Forward: for a tile of query rows, one pass over the visible keys with the softmax computed online.
//
//   Sᵀ = K Qᵀ,   m = running maximum of a row,   P = exp(softmax_scale · S − m),   Oᵀ = Σ Vᵀ P,   l = Σ P
//
// When a later block raises m, O and l are multiplied by exp(m_old − m_new). At the end out = O / l, lse = m + log l.
// The arithmetic is fp32; with AVX512-BF16 the products of bf16 inputs are those of pairs, and P is rounded to bf16.
#include <type_traits>

#include "block_causal_attention_few_rows.h"
#include "block_causal_attention_pairs.h"

namespace var_kernels::VAR_ISA {
namespace {

// The running maximum (in units of the exponent below), the sum, and the factor of a block; one float per lane.
struct Softmax {
  float *max, *sum, *factor;
};

// Rows (keys) [begin, end) of scores: their maximum in the lanes of one vector, joined with `top`. NaN loses.
VAR_INLINE Vec top_of(const float* scores, int64_t lanes, int64_t begin, int64_t end, Vec top) {
  Vec other = top;
  int64_t key = begin;
  for (; key + 2 <= end; key += 2) {
    top = max_v(load(scores + key * lanes), top);
    other = max_v(load(scores + (key + 1) * lanes), other);
  }
  if (key < end) top = max_v(load(scores + key * lanes), top);
  return max_v(other, top);
}

// Raises the maximum of all lanes; true if a lane of O must be multiplied by its factor, which l has been already.
template <class E>
VAR_INLINE bool raise_max(const Softmax& s, const float* top, int64_t lanes, const E& exponent) {
  IVec changed{};
  for (int64_t r = 0; r < lanes; r += kWidth) {
    const Vec before = load(s.max + r), block = exponent.scaled(load(top + r)), after = max_v(block, before);
    const Vec base = after == -kInfinity ? Vec{} : after;  // -inf − -inf would be NaN where P is 0
    const Vec factor = after == before ? splat(1.0f) : exp2_v(exponent.log2_of(before - base));
    store(s.max + r, after);
    store(s.factor + r, factor);
    store(s.sum + r, load(s.sum + r) * factor);
    changed |= factor != 1.0f;
  }
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= changed[i];
  return any != 0;
}

VAR_INLINE void rescale(const Softmax& s, int64_t dim, int64_t lanes, float* out) {
  for (int64_t r = 0; r < lanes; r += kWidth) {
    const Vec factor = load(s.factor + r);
    for (int64_t d = 0; d < dim; ++d) store(out + d * lanes + r, load(out + d * lanes + r) * factor);
  }
}

VAR_INLINE Vec base_of(const Softmax& s, int64_t r) {
  const Vec max = load(s.max + r);
  return max == -kInfinity ? Vec{} : max;
}

// ---- operands: fp32 ---------------------------------------------------------------------------------------------

// K and V where they lie if they are fp32 and few tiles read them, else copied: a packed qkv puts every row into the
// same cache sets.
template <class T>
struct Operands {
  static constexpr int64_t kBlock = 64;  // keys per step: the scores of 48 rows take 12 KiB
  float *key_copy, *value_copy, *queries, *part;
  const float *keys, *values;
  int64_t key_row, value_row, dim;

  Operands(Scratch& scratch, const AttentionProblem& p, bool once) : dim(p.dim) {
    const int64_t words = copies(once) ? p.keys * round_up(dim, kWidth) : 0;
    key_copy = scratch.take(words);
    value_copy = scratch.take(words);
    queries = scratch.take(dim * kMaxTileRows);
    part = scratch.take(round_up(dim, kWidth) * kMaxTileRows);
  }
  static constexpr bool copies(bool once) { return sizeof(T) != sizeof(float) || !once; }

  void load_keys(const HeadRows& k, const HeadRows& v, int64_t batch, int64_t kv_head, int64_t count, bool once) {
    const T *k_rows = row_of<const T>(k, batch, kv_head, 0), *v_rows = row_of<const T>(v, batch, kv_head, 0);
    if (copies(once)) {
      key_row = value_row = round_up(dim, kWidth);
      load_rows(k_rows, k.row, count, dim, 1.0f, key_copy, key_row);
      load_rows(v_rows, v.row, count, dim, 1.0f, value_copy, value_row);
      keys = key_copy, values = value_copy;
    } else {
      key_row = k.row, value_row = v.row;
      keys = reinterpret_cast<const float*>(k_rows), values = reinterpret_cast<const float*>(v_rows);
    }
  }
  void load_queries(const T* q, int64_t row, int64_t rows, float softmax_scale, int64_t lanes) {
    load_transposed(q, row, rows, dim, softmax_scale, queries, lanes);
  }
  void multiply_keys(int64_t begin, int64_t count, int64_t lanes, float* scores) const {
    multiply_rows(count, lanes, dim, keys + begin * key_row, key_row, queries, scores);
  }
  // out += the keys [begin, end) of the block that starts at `block`.
  void add_values(int64_t block, int64_t begin, int64_t end, const float* p, int64_t lanes, float* out) const {
    gemm(dim, lanes, end - begin, values + (block + begin) * value_row, 1, value_row, p + begin * lanes, lanes, out,
         lanes, true);
  }

  // softmax_scale is in Q: rounding it there costs less than rounding the difference to the maximum.
  struct Exponent {
    explicit Exponent(float) {}
    VAR_INLINE Vec scaled(Vec score) const { return score; }
    VAR_INLINE Vec log2_of(Vec difference) const { return difference * kLog2E; }
    VAR_INLINE Vec natural(Vec scaled) const { return scaled; }
  };

  // One vector of lanes, keys [begin, end): scores become P in place; returns their sum.
  static VAR_INLINE Vec exponentials(const Exponent&, float* scores, float*, int64_t lanes, int64_t begin, int64_t end,
                                     Vec base) {
    Vec sum{}, other{};
    int64_t key = begin;
    for (; key + 2 <= end; key += 2) {
      const Vec p = exp2_v((load(scores + key * lanes) - base) * kLog2E);
      const Vec q = exp2_v((load(scores + (key + 1) * lanes) - base) * kLog2E);
      store(scores + key * lanes, p);
      store(scores + (key + 1) * lanes, q);
      sum += p;
      other += q;
    }
    if (key < end) {
      const Vec p = exp2_v((load(scores + key * lanes) - base) * kLog2E);
      store(scores + key * lanes, p);
      sum += p;
    }
    return sum + other;
  }
  static float* probabilities(float* scores, float*) { return scores; }
  static void finish_probabilities(float*, int64_t, int64_t) {}
};

// ---- operands: pairs of bf16 ------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
template <>
struct Operands<bf16> {
#if defined(__AMX_BF16__)
  static constexpr int64_t kBlock = 64;
#else
  static constexpr int64_t kBlock = 64;
#endif
  using Values = TransposedBlocks<kBlock>;
  Pair *keys, *values, *queries, *step_copy;
  float* part;
  int64_t dim, words;  // words: pairs in a row of keys

  Operands(Scratch& scratch, const AttentionProblem& p, bool) : dim(p.dim), words(round_up(p.dim, kStep) / 2) {
    keys = scratch.take_pairs(round_up(p.keys, 16) * words);
    values = scratch.take_pairs(Values::words(p.keys, dim));
    queries = scratch.take_pairs(words * kMaxTileRows);
    step_copy = scratch.take_pairs(round_up(dim, 16) * kStep / 2);
    part = scratch.take(round_up(dim, 16) * kMaxTileRows);
  }
  void load_keys(const HeadRows& k, const HeadRows& v, int64_t batch, int64_t kv_head, int64_t count, bool) {
    copy_rows(row_of<const bf16>(k, batch, kv_head, 0), k.row, count, dim, keys);
    Values::pack(row_of<const bf16>(v, batch, kv_head, 0), v.row, count, dim, values);
  }
  void load_queries(const bf16* q, int64_t row, int64_t rows, float softmax_scale, int64_t lanes) {
    load_pairs_transposed(q, row, rows, dim, softmax_scale < 0.0f ? 0x80008000u : 0u, queries, lanes);
  }
  void multiply_keys(int64_t begin, int64_t count, int64_t lanes, float* scores) const {
    gemm(round_up(count, 16), lanes, words, keys + begin * words, words, 1, queries, lanes, scores, lanes, false);
  }
  const Pair* block_values(int64_t block) const { return values + block / 2 * round_up(dim, 16); }
  void add_values(int64_t block, int64_t begin, int64_t end, const Pair* p, int64_t lanes, float* out) const {
    Values::multiply(block_values(block), dim, begin, end, p, lanes, step_copy, out);
  }

  // Q is exact, its sign is that of softmax_scale; scale · log2 e multiplies the scores.
  struct Exponent {
    Vec factor;
    explicit Exponent(float softmax_scale) : factor(splat(__builtin_fabsf(softmax_scale) * kLog2E)) {}
    VAR_INLINE Vec scaled(Vec score) const { return score * factor; }
    VAR_INLINE Vec log2_of(Vec difference) const { return difference; }
    VAR_INLINE Vec natural(Vec scaled) const { return scaled * kLn2; }
  };

  // `begin` is even. An odd last key is paired with 0.
  static VAR_INLINE Vec exponentials(const Exponent& exponent, const float* scores, Pair* p, int64_t lanes,
                                     int64_t begin, int64_t end, Vec base) {
    Vec sum{}, other{};
    int64_t key = begin;
    for (; key + 2 <= end; key += 2) {
      const Vec low = exp2_v(load(scores + key * lanes) * exponent.factor - base);
      const Vec high = exp2_v(load(scores + (key + 1) * lanes) * exponent.factor - base);
      sum += low;
      other += high;
      store(p + key / 2 * lanes, interleave(low, high));
    }
    if (key < end) {
      const Vec low = exp2_v(load(scores + key * lanes) * exponent.factor - base);
      sum += low;
      store(p + key / 2 * lanes, interleave(low, Vec{}));
    }
    return sum + other;
  }
  static Pair* probabilities(float*, Pair* p) { return p; }
  // Zero from `end` to the end of its step.
  static void finish_probabilities(Pair* p, int64_t end, int64_t lanes) {
    const int64_t first = (end + 1) / 2 * lanes, last = round_up(end, kStep) / 2 * lanes;
    memset(p + first, 0, (last - first) * sizeof(Pair));
  }
};
#endif

// ---- one tile ---------------------------------------------------------------------------------------------------

template <class T>
struct ScalarOf { using Type = float; };
#if defined(__AVX512BF16__)
template <>
struct ScalarOf<bf16> { using Type = Pair; };
#endif

template <class T>
struct ForwardScratch {
  using P = typename ScalarOf<T>::Type;
  static constexpr int64_t kBlock = Operands<T>::kBlock;
  Operands<T> operands;
  float *scores[2], *out, *top;  // (kBlock, lanes); (D up to 16, lanes); (lanes)
  P* p[2];                       // (kBlock, lanes), pairs (kBlock / 2, lanes)
  Softmax softmax;
  FewRowsScratch few;

  ForwardScratch(Scratch& scratch, const AttentionProblem& problem, bool once)
      : operands(scratch, problem, once), few(scratch, problem.dim) {
    for (float*& memory : scores) memory = scratch.take(kBlock * kMaxTileRows);
    for (P*& memory : p) memory = reinterpret_cast<P*>(scratch.take(kBlock * kMaxTileRows / 2));
    out = scratch.take(round_up(problem.dim, 16) * kMaxTileRows);
    top = scratch.take(kMaxTileRows);
    softmax = {scratch.take(kMaxTileRows), scratch.take(kMaxTileRows), scratch.take(kMaxTileRows)};
  }
};

// O of the rows that see the keys [begin, end) of a block; the rows of a tile of small scales see different numbers.
// An invisible value is never multiplied, not even by 0: 0 · NaN would carry a later scale into an earlier one.
template <class T>
void add_visible_values(const Operands<T>& operands, const int64_t* visible, int64_t rows, int64_t block,
                        int64_t columns, const typename ScalarOf<T>::Type* p, int64_t lanes, float* out) {
  for (int64_t begin = 0, end; begin < columns; begin = end) {
    const int64_t first = first_row_beyond(visible, rows, block + begin);
    end = seen_in_block(visible[first], block, columns);
    if (first == 0) {
      operands.add_values(block, begin, end, p, lanes, out);
      continue;
    }
    const int64_t count = operands.dim * lanes;
    memset(operands.part, 0, count * sizeof(float));
    operands.add_values(block, begin, end, p, lanes, operands.part);
    for (int64_t i = 0; i < count; i += lanes)
      for (int64_t r = first; r < rows; ++r) out[i + r] += operands.part[i + r];
  }
}

template <class T>
void attend(const ForwardScratch<T>& s, const int64_t* visible, int64_t rows, int64_t lanes,
            const typename Operands<T>::Exponent& exponent) {
  constexpr int64_t kBlock = Operands<T>::kBlock;
  const int64_t keys = visible[rows - 1], dim = s.operands.dim;
  float* scores = s.scores[0];
  auto* p = Operands<T>::probabilities(scores, s.p[0]);
  for (int64_t begin = 0; begin < keys; begin += kBlock) {
    const int64_t columns = min_i(keys - begin, kBlock);
    s.operands.multiply_keys(begin, columns, lanes, scores);
    for (int64_t key = max_i(visible[0] - begin, 0); key < columns; ++key)
      fill(scores + key * lanes, first_row_beyond(visible, rows, begin + key), -kInfinity);
    for (int64_t r = 0; r < lanes; r += kWidth)
      store(s.top + r, top_of(scores + r, lanes, 0, columns, splat(-kInfinity)));
    if (raise_max(s.softmax, s.top, lanes, exponent)) rescale(s.softmax, dim, lanes, s.out);
    for (int64_t r = 0; r < lanes; r += kWidth) {
      const Vec sum = Operands<T>::exponentials(exponent, scores + r, s.p[0] + r, lanes, 0, columns,
                                                base_of(s.softmax, r));
      store(s.softmax.sum + r, load(s.softmax.sum + r) + sum);
    }
    Operands<T>::finish_probabilities(s.p[0], columns, lanes);
    add_visible_values<T>(s.operands, visible, rows, begin, columns, p, lanes, s.out);
  }
}

#if defined(__AMX_BF16__)
// The same for rows that all see [0, keys), with three blocks in flight: while the vector units take the exponentials
// of one block, the tile unit multiplies the keys of the next and the values of the one before. The processor overlaps
// them by itself where the instructions lie near each other, so each does 16 keys, or its share, in turn.
void attend_overlapped(const ForwardScratch<bf16>& s, int64_t keys, int64_t lanes,
                       const Operands<bf16>::Exponent& exponent) {
  constexpr int64_t kBlock = Operands<bf16>::kBlock, kChunks = kBlock / 16;
  const Operands<bf16>& operands = s.operands;
  const int64_t rows = round_up(operands.dim, 16), blocks = (keys + kBlock - 1) / kBlock;
  Vec top[kMaxTileRows / kWidth];
  const auto multiply_keys = [&](int64_t block, int64_t chunk) VAR_LAMBDA {
    const int64_t key = chunk * 16;
    if (block * kBlock + key < keys)
      operands.multiply_keys(block * kBlock + key, 16, lanes, s.scores[block % 2] + key * lanes);
  };
  const auto find_top = [&](int64_t block, int64_t chunk) VAR_LAMBDA {
    const int64_t begin = chunk * 16, end = min_i(begin + 16, keys - block * kBlock);
    for (int64_t r = 0; r < lanes; r += kWidth)
      top[r / kWidth] = top_of(s.scores[block % 2] + r, lanes, begin, end, top[r / kWidth]);
  };
  const auto start_top = [&] VAR_LAMBDA {
    for (Vec& lane : top) lane = splat(-kInfinity);
  };

  start_top();
  for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
    multiply_keys(0, chunk);
    find_top(0, chunk);
  }
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t columns = min_i(keys - block * kBlock, kBlock);
    for (int64_t r = 0; r < lanes; r += kWidth) store(s.top + r, top[r / kWidth]);
    const bool raised = raise_max(s.softmax, s.top, lanes, exponent);
    start_top();
    Pair* p = s.p[block % 2];
    for (int64_t chunk = 0; chunk < kChunks; ++chunk) {
      if (block + 1 < blocks) multiply_keys(block + 1, chunk);
      const int64_t begin = chunk * 16, end = min_i(begin + 16, columns);
      if (begin < end)
        for (int64_t r = 0; r < lanes; r += kWidth) {
          const Vec sum = Operands<bf16>::exponentials(exponent, s.scores[block % 2] + r, p + r, lanes, begin, end,
                                                       base_of(s.softmax, r));
          store(s.softmax.sum + r, load(s.softmax.sum + r) + sum);
        }
      if (block > 0) {
        const int64_t first = rows / 16 * chunk / kChunks * 16, last = rows / 16 * (chunk + 1) / kChunks * 16;
        const Pair* values = operands.block_values((block - 1) * kBlock);
        gemm(last - first, lanes, kBlock / 2, values + first * kBlock / 2, kBlock / 2, 1, s.p[(block - 1) % 2], lanes,
             s.out + first * lanes, lanes, true);
      }
      if (block + 1 < blocks) find_top(block + 1, chunk);
    }
    Operands<bf16>::finish_probabilities(p, columns, lanes);
    if (raised) rescale(s.softmax, rows, lanes, s.out);
  }
  const int64_t last = (blocks - 1) * kBlock;
  operands.add_values(last, 0, keys - last, s.p[(blocks - 1) % 2], lanes, s.out);
}
#endif

template <class T>
void forward_tile(const AttentionForwardArgs& args, const AttentionForwardTask& task, int64_t head, QueryTile tile,
                  ForwardScratch<T>& s) {
  const AttentionProblem& p = args.problem;
  const int64_t rows = tile.end - tile.begin, lanes = round_up(rows, 16);
  const int64_t* visible = p.visible + tile.begin;
  const typename Operands<T>::Exponent exponent(p.softmax_scale);
  s.operands.load_queries(row_of<const T>(args.q, task.batch, head, tile.begin), args.q.row, rows, p.softmax_scale,
                          lanes);
  memset(s.out, 0, round_up(p.dim, 16) * lanes * sizeof(float));
  memset(s.softmax.sum, 0, lanes * sizeof(float));
  fill(s.softmax.max, lanes, -kInfinity);
  bool overlapped = false;
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<T, bf16>)
    if (visible[0] == visible[rows - 1]) attend_overlapped(s, visible[0], lanes, exponent), overlapped = true;
#endif
  if (!overlapped) attend<T>(s, visible, rows, lanes, exponent);

  float* lse = args.lse + (task.batch * p.heads + head) * p.queries + tile.begin;
  for (int64_t r = 0; r < lanes; r += kWidth) {
    const Vec sum = load(s.softmax.sum + r);
    const Vec value = exponent.natural(load(s.softmax.max + r)) + log_v(sum);
    store(s.softmax.factor + r, 1.0f / sum);
    if (rows - r >= kWidth)
      store(lse + r, value);
    else if (rows > r)
      store_tail(lse + r, value, rows - r);
  }
  store_transposed(s.out, lanes, rows, p.dim, s.softmax.factor, row_of<T>(args.out, task.batch, head, tile.begin),
                   args.out.row);
}

// Decided by the tile alone: the two ways round differently, and how tiles are split into tasks depends on the threads.
VAR_INLINE bool few_rows(QueryTile tile) { return tile.end - tile.begin <= kFewRows; }

VAR_INLINE bool once(const AttentionForwardTask& task) { return task.unit_end - task.unit_begin == 1; }

template <class T>
int64_t scratch_size(const AttentionProblem& problem, const AttentionForwardTask& task) {
  Scratch scratch{nullptr};
  ForwardScratch<T>(scratch, problem, once(task));
  return scratch.taken;
}

template <class T>
void forward(const AttentionForwardArgs& args, const AttentionForwardTask& task, float* memory) {
  const AttentionProblem& p = args.problem;
  Scratch scratch{memory};
  ForwardScratch<T> s(scratch, p, once(task));
  int64_t keys = 0;
  for (int64_t unit = task.unit_begin; unit < task.unit_end; ++unit) {
    const QueryTile tile = p.tiles[unit % p.tile_count];
    if (!few_rows(tile)) keys = max_i(keys, p.visible[tile.end - 1]);
  }
  if (keys > 0) s.operands.load_keys(args.k, args.v, task.batch, task.kv_head, keys, once(task));
  const int64_t group = p.heads / p.kv_heads;
  const TileUnit unit_is_ready;
  for (int64_t unit = task.unit_begin; unit < task.unit_end; ++unit) {
    const QueryTile tile = p.tiles[unit % p.tile_count];
    const int64_t head = task.kv_head * group + unit / p.tile_count;
    if (few_rows(tile))
      forward_few_rows<T>(args, task.batch, task.kv_head, head, tile, s.few);
    else
      forward_tile<T>(args, task, head, tile, s);
  }
}

}  // namespace

extern const AttentionForward attention_forward = {
    {scratch_size<float>, scratch_size<bf16>, scratch_size<fp16>},
    {forward<float>, forward<bf16>, forward<fp16>},
};

}  // namespace var_kernels::VAR_ISA
