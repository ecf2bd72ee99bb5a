// The forward of block_causal_attention: for each tile of query rows, one pass over the visible keys with an online
// softmax.
//
//   Sᵀ = K Qᵀ,   m = base of a row, near its maximum,   P = exp(softmax_scale · S − m),   Oᵀ = Σ Vᵀ P,   l = Σ P
//
// When a later block raises m, O and l are multiplied by exp(m_old − m_new). At the end out = O / l, lse = m + log l.
// The arithmetic is fp32. With AVX512-BF16, bf16 inputs are multiplied as pairs, and P is rounded to bf16.
#include "block_causal_attention_few_rows.h"
#include "block_causal_attention_pairs.h"

namespace var_kernels::VAR_ISA {
namespace {

// One float per lane: the base that is subtracted from the scores, in the units of `Exponent` below; the sum l; the
// factor by which a new base multiplies O.
struct Softmax {
  float *base, *sum, *factor;
};

// The maximum of the scores in each lane of one vector. NaN never becomes the maximum.
VAR_INLINE Vec top_of(const float* scores, int64_t lanes, int64_t keys) {
  Vec top[4] = {splat(-kInfinity), splat(-kInfinity), splat(-kInfinity), splat(-kInfinity)};
  int64_t key = 0;
  for (; key + 4 <= keys; key += 4)
    for (int i = 0; i < 4; ++i) top[i] = max_v(load(scores + (key + i) * lanes), top[i]);
  for (; key < keys; ++key) top[0] = max_v(load(scores + key * lanes), top[0]);
  return max_v(max_v(top[0], top[1]), max_v(top[2], top[3]));
}

// Raises the base of a lane to the maximum of its scores if that exceeds the base by more than kSlack. Smaller excesses
// give P up to 2^8, which loses no accuracy. If the base were always the maximum, O would have to be multiplied in
// almost every block. Returns whether a lane of O must be multiplied by its factor; l is multiplied here.
template <class E>
VAR_INLINE bool raise_base(const float* scores, int64_t keys, int64_t lanes, const Softmax& s, const E& exponent) {
  bool raised = false;
  for (int64_t r = 0; r < lanes; r += kWidth) {
    const Vec before = load(s.base + r), top = exponent.scaled(top_of(scores + r, lanes, keys));
    const Vec over = top > before + E::kSlack ? splat(1.0f) : Vec{};
    if (reduce_max(over) == 0.0f) {
      store(s.factor + r, splat(1.0f));
      continue;
    }
    const Vec after = over != 0.0f ? top : before;  // a raised base is not -inf
    const Vec factor = over != 0.0f ? exp2_v(exponent.log2_of(before - after)) : splat(1.0f);
    store(s.base + r, after);
    store(s.factor + r, factor);
    store(s.sum + r, load(s.sum + r) * factor);
    raised = true;
  }
  return raised;
}

VAR_INLINE void rescale(const Softmax& s, int64_t dim, int64_t lanes, float* out) {
  for (int64_t r = 0; r < lanes; r += kWidth) {
    const Vec factor = load(s.factor + r);
    for (int64_t d = 0; d < dim; ++d) store(out + d * lanes + r, load(out + d * lanes + r) * factor);
  }
}

// The base, but 0 if it is -inf: P must then be 0, and -inf − -inf would be NaN.
VAR_INLINE Vec base_of(const Softmax& s, int64_t r) {
  const Vec base = load(s.base + r);
  return base == -kInfinity ? Vec{} : base;
}

// The prefetches ahead of use: one line or a few lines for every two keys, while the vector units are busy.
struct Ahead {
  const char *soon = nullptr, *output = nullptr;  // operands of the next products, into L1; rows of the output, into L2
  int64_t soon_lines = 0, output_row = 0, output_bytes = 0, rows = 0, at = 0;  // at: bytes of the first of these rows

  VAR_INLINE void next() {
    for (int64_t i = 0; i < soon_lines; ++i) __builtin_prefetch(soon + i * 64);
    soon += soon_lines * 64;
    if (rows == 0) return;
    __builtin_prefetch(output + at, 0, 2);
    at += 64;
    if (at < output_bytes) return;
    at = 0;
    output += output_row;
    --rows;
  }
};

// ---- operands: fp32 ---------------------------------------------------------------------------------------------

// K and V are read where they are if they are fp32 and one tile reads them. Otherwise they are copied, because the rows
// of a packed qkv all fall into the same cache sets.
template <class T>
struct Operands {
  static constexpr int64_t kTileRows = kMaxTileRows, kFew = kFewRows;
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
  void ask_soon(int64_t, int64_t, Ahead&) const {}
  // out += the keys [begin, end) of the block that starts at `block`.
  void add_values(int64_t block, int64_t begin, int64_t end, const float* p, int64_t lanes, float* out) const {
    gemm(dim, lanes, end - begin, values + (block + begin) * value_row, 1, value_row, p + begin * lanes, lanes, out,
         lanes, true);
  }

  // Q has been multiplied by softmax_scale: this rounding costs less accuracy than one of the difference to the
  // maximum.
  struct Exponent {
    static constexpr float kSlack = 8 * kLn2;
    explicit Exponent(float) {}
    VAR_INLINE Vec scaled(Vec score) const { return score; }
    VAR_INLINE Vec log2_of(Vec difference) const { return difference * kLog2E; }
    VAR_INLINE Vec natural(Vec scaled) const { return scaled; }
  };

  // Turns the scores of one vector of lanes into P, in place, and returns the sum of P.
  static VAR_INLINE Vec exponentials(const Exponent&, float* scores, float*, int64_t lanes, int64_t keys, Vec base,
                                     Ahead& ahead) {
    const auto take = [=](int64_t key) VAR_LAMBDA {
      const Vec p = exp2_v((load(scores + key * lanes) - base) * kLog2E);
      store(scores + key * lanes, p);
      return p;
    };
    Vec even{}, odd{};
    int64_t key = 0;
    for (; key + 2 <= keys; key += 2) {
      ahead.next();
      even += take(key);
      odd += take(key + 1);
    }
    return (key < keys ? even + take(key) : even) + odd;
  }
  static float* probabilities(float* scores, float*) { return scores; }
  static void finish_probabilities(float*, int64_t, int64_t) {}
};

// ---- operands: pairs of bf16 ------------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
template <>
struct Operands<bf16> {
#if defined(__AMX_BF16__)
  static constexpr int64_t kTileRows = 32, kFew = 4;  // two columns of tiles; 48 or 64 rows were slower
#else
  static constexpr int64_t kTileRows = kMaxTileRows, kFew = kFewRows;
#endif
  static constexpr int64_t kBlock = 64;
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
  // Prefetches the values of the block and the keys of the next one: tiles are read once for 32 rows, and without the
  // prefetch at the speed of L2.
  void ask_soon(int64_t block, int64_t r, Ahead& ahead) const {
    const Pair* at = r == 0 ? values + block / 2 * round_up(dim, 16) : keys + (block + kBlock) * words;
    ahead.soon = reinterpret_cast<const char*>(at);
    ahead.soon_lines = r < 2 * kWidth ? words / 8 : 0;
  }
  void add_values(int64_t block, int64_t begin, int64_t end, const Pair* p, int64_t lanes, float* out) const {
    Values::multiply(values + block / 2 * round_up(dim, 16), dim, begin, end, p, lanes, step_copy, out);
  }

  // Q is not rounded again; it carries the sign of softmax_scale. The scores are multiplied by |softmax_scale| · log2
  // e.
  struct Exponent {
    static constexpr float kSlack = 8;
    Vec factor;
    explicit Exponent(float softmax_scale) : factor(splat(__builtin_fabsf(softmax_scale) * kLog2E)) {}
    VAR_INLINE Vec scaled(Vec score) const { return score * factor; }
    VAR_INLINE Vec log2_of(Vec difference) const { return difference; }
    VAR_INLINE Vec natural(Vec scaled) const { return scaled * kLn2; }
  };

  // Turns the scores of one vector of lanes into pairs of P and returns the sum of P. An odd last key is paired with 0.
  static VAR_INLINE Vec exponentials(const Exponent& exponent, const float* scores, Pair* p, int64_t lanes,
                                     int64_t keys, Vec base, Ahead& ahead) {
    const auto take = [=, &exponent](int64_t key) VAR_LAMBDA {
      return exp2_v(load(scores + key * lanes) * exponent.factor - base);
    };
    Vec even{}, odd{};
    int64_t key = 0;
    for (; key + 2 <= keys; key += 2) {
      ahead.next();
      const Vec low = take(key), high = take(key + 1);
      even += low;
      odd += high;
      store(p + key / 2 * lanes, interleave(low, high));
    }
    if (key < keys) {
      const Vec low = take(key);
      even += low;
      store(p + key / 2 * lanes, interleave(low, Vec{}));
    }
    return even + odd;
  }
  static Pair* probabilities(float*, Pair* p) { return p; }
  // Sets P of the keys from `end` to the end of its step to zero.
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
  float *scores, *out;  // (kBlock, lanes); (D up to 16, lanes)
  P* p;                 // pairs (kBlock / 2, lanes)
  Softmax softmax;
  FewRowsScratch few;

  ForwardScratch(Scratch& scratch, const AttentionProblem& problem, bool once)
      : operands(scratch, problem, once), few(scratch, problem.dim) {
    scores = scratch.take(kBlock * kMaxTileRows);
    p = reinterpret_cast<P*>(scratch.take(kBlock * kMaxTileRows / 2));
    out = scratch.take(round_up(problem.dim, 16) * kMaxTileRows);
    softmax = {scratch.take(kMaxTileRows), scratch.take(kMaxTileRows), scratch.take(kMaxTileRows)};
  }
};

// Adds the values of a block to O of the rows that see them. In a tile of small scales the rows see different numbers
// of keys, so the block is divided. An invisible value is never multiplied, not even by 0, because 0 · NaN would carry
// a later scale into an earlier one.
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
            const typename Operands<T>::Exponent& exponent, Ahead& ahead) {
  constexpr int64_t kBlock = Operands<T>::kBlock;
  const int64_t keys = visible[rows - 1], dim = s.operands.dim;
  auto* p = Operands<T>::probabilities(s.scores, s.p);
  for (int64_t begin = 0; begin < keys; begin += kBlock) {
    const int64_t columns = min_i(keys - begin, kBlock);
    s.operands.multiply_keys(begin, columns, lanes, s.scores);
    for (int64_t key = max_i(visible[0] - begin, 0); key < columns; ++key)
      fill(s.scores + key * lanes, first_row_beyond(visible, rows, begin + key), -kInfinity);
    if (raise_base(s.scores, columns, lanes, s.softmax, exponent)) rescale(s.softmax, dim, lanes, s.out);
    for (int64_t r = 0; r < lanes; r += kWidth) {
      s.operands.ask_soon(begin, r, ahead);
      const Vec sum = Operands<T>::exponentials(exponent, s.scores + r, p + r, lanes, columns, base_of(s.softmax, r), ahead);
      store(s.softmax.sum + r, load(s.softmax.sum + r) + sum);
    }
    Operands<T>::finish_probabilities(p, columns, lanes);
    add_visible_values<T>(s.operands, visible, rows, begin, columns, p, lanes, s.out);
  }
}

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
  fill(s.softmax.base, lanes, -kInfinity);
  Ahead ahead;
  T* out = row_of<T>(args.out, task.batch, head, tile.begin);
  ahead.output = reinterpret_cast<const char*>(out);
  ahead.output_row = args.out.row * int64_t(sizeof(T));
  ahead.output_bytes = p.dim * int64_t(sizeof(T));
  ahead.rows = rows;
  attend<T>(s, visible, rows, lanes, exponent, ahead);

  float* lse = args.lse + (task.batch * p.heads + head) * p.queries + tile.begin;
  for (int64_t r = 0; r < lanes; r += kWidth) {
    const Vec sum = load(s.softmax.sum + r);
    const Vec value = exponent.natural(load(s.softmax.base + r)) + log_v(sum);
    store(s.softmax.factor + r, 1.0f / sum);
    if (rows - r >= kWidth)
      store(lse + r, value);
    else if (rows > r)
      store_tail(lse + r, value, rows - r);
  }
  store_transposed(s.out, lanes, rows, p.dim, s.softmax.factor, out, args.out.row);
}

// Whether a tile is computed by forward_few_rows. The two paths round differently, so this depends on the tile alone:
// choosing per task would make results depend on the number of threads.
template <class T>
VAR_INLINE bool few_rows(QueryTile tile) {
  return tile.end - tile.begin <= Operands<T>::kFew;
}

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
    if (!few_rows<T>(tile)) keys = max_i(keys, p.visible[tile.end - 1]);
  }
  if (keys > 0) s.operands.load_keys(args.k, args.v, task.batch, task.kv_head, keys, once(task));
  const int64_t group = p.heads / p.kv_heads;
  const TileUnit unit_is_ready;
  for (int64_t unit = task.unit_begin; unit < task.unit_end; ++unit) {
    const QueryTile tile = p.tiles[unit % p.tile_count];
    const int64_t head = task.kv_head * group + unit / p.tile_count;
    if (few_rows<T>(tile))
      forward_few_rows<T>(args, task.batch, task.kv_head, head, tile, s.few);
    else
      forward_tile<T>(args, task, head, tile, s);
  }
}

}  // namespace

extern const AttentionForward attention_forward = {
    {Operands<float>::kTileRows, Operands<bf16>::kTileRows, Operands<fp16>::kTileRows},
    {scratch_size<float>, scratch_size<bf16>, scratch_size<fp16>},
    {forward<float>, forward<bf16>, forward<fp16>},
};

}  // namespace var_kernels::VAR_ISA
