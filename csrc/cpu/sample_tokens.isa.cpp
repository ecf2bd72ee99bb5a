// Draws one token from one row of logits: guidance, top-k, top-p and the draw, on a row that stays in L1 (16 KiB at
// V = 4096).
//
// Nothing is sorted. `keys` are integers in the order of the fp32 numbers, and both thresholds are found by bisection
// over keys. Each step counts the logits from a key on (top-k), or adds up the probabilities up to a key (top-p), with
// a compare and an addition for each vector; there are at most 32 steps. The tokens whose key is at least the threshold
// stay. Only if several equal logits lie on the border of top-p, some of them are dropped one by one.
#include "sample_tokens.h"

#include "isa.h"

namespace var_kernels::VAR_ISA {
namespace {

// Integers in the order of the floats, none of which may be -0.
VAR_INLINE IVec keys_of(Vec v) {
  const IVec bits = (IVec)v;
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
VAR_INLINE int32_t key_of(float x) {
  const int32_t bits = int32_t(float_to_bits(x));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
constexpr int32_t kKeyOfMinusInfinity = int32_t(0xff800000u ^ 0x7fffffffu);

VAR_INLINE int32_t middle(int32_t low, int32_t high) { return int32_t((int64_t(low) + high + 1) >> 1); }  // rounded up

// ---- the row ----------------------------------------------------------------------------------------------------

// Computes the guided logits in fp32, with -inf in place of NaN, pads them to `padded` with -inf, and returns the
// largest.
template <class T>
VAR_INLINE float guided_logits(const SampleTokens& a, const T* conditional, const T* unconditional, int64_t padded,
                               float* logits) {
  Vec largest = splat(-kInfinity);
  const auto at = [&](int64_t v, auto read) VAR_LAMBDA {
    Vec x = read(conditional + v);
    if (unconditional != nullptr) x = x * (1.0f + a.guidance) - read(unconditional + v) * a.guidance;
    x = x == x ? x + 0.0f : splat(-kInfinity);  // + 0 turns -0, whose key is not that of 0, into 0
    return x;
  };
  int64_t v = 0;
  for (; v + kWidth <= a.vocab; v += kWidth) {
    const Vec x = at(v, [](const T* p) VAR_LAMBDA { return load(p); });
    largest = max_v(largest, x);
    store(logits + v, x);
  }
  for (; v < padded; v += kWidth) {
    Vec x = splat(-kInfinity);
    if (v < a.vocab) {
      x = at(v, [&](const T* p) VAR_LAMBDA { return load_tail(p, a.vocab - v); });
      for (int i = 0; i < kWidth; ++i) x[i] = v + i < a.vocab ? x[i] : -kInfinity;
      largest = max_v(largest, x);
    }
    store(logits + v, x);
  }
  return reduce_max(largest);
}

// ---- top-k ------------------------------------------------------------------------------------------------------

// A key that exactly the k largest logits reach, together with those that equal the k-th.
inline int32_t top_k_key(const float* logits, int64_t padded, int64_t k, int32_t low, int32_t high) {
  while (low < high) {  // at least k keys reach `low`, and fewer than k exceed `high`
    const int32_t key = middle(low, high);
    IVec counts{};
    for (int64_t v = 0; v < padded; v += kWidth) counts -= keys_of(load(logits + v)) >= key;  // true is -1
    int64_t count = 0;
    for (int i = 0; i < kWidth; ++i) count += counts[i];
    if (count == k) return key;
    if (count > k)
      low = key;
    else
      high = key - 1;
  }
  return low;
}

// ---- top-p ------------------------------------------------------------------------------------------------------

// Computes the probabilities, not normalised, of the logits whose key is at least `key`, and zeros for the others.
// Returns their sum.
VAR_INLINE float probabilities_of(const float* logits, int64_t padded, int32_t key, float largest, float* out) {
  Vec sum{};
  for (int64_t v = 0; v < padded; v += kWidth) {
    const Vec x = load(logits + v);
    const Vec p = exp2_v((x - largest) * kLog2E);
    const Vec kept = keys_of(x) >= key ? p : Vec{};
    sum += kept;
    store(out + v, kept);
  }
  return reduce_add(sum);
}

inline float sum_up_to(const float* logits, const float* probabilities, int64_t padded, int32_t key) {
  Vec sums[4] = {};
  for (int64_t v = 0; v < padded; v += 4 * kWidth)  // whole blocks of 64
    for (int i = 0; i < 4; ++i) {
      const int64_t at = v + i * kWidth;
      sums[i] += keys_of(load(logits + at)) <= key ? load(probabilities + at) : Vec{};
    }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The key below which everything is dropped: the probabilities below it add up to at most `budget`, and those of the
// next key would exceed it. Of several logits with exactly this key, more are dropped as far as the budget allows:
// those with lower indices first, and never the last one. They are set to -inf.
inline int32_t top_p_key(float* logits, float* probabilities, int64_t padded, float budget, int32_t low, int32_t high) {
  low -= 1, high -= 1;
  // Probabilities up to `low` fit the budget; those up to `high + 1` do not, or `high + 1` is the largest key.
  while (low < high) {
    const int32_t key = middle(low, high);
    if (sum_up_to(logits, probabilities, padded, key) <= budget)
      low = key;
    else
      high = key - 1;
  }
  IVec next = IVec{} + INT32_MAX, ties{};
  for (int64_t v = 0; v < padded; v += kWidth) {
    const IVec keys = keys_of(load(logits + v));
    const IVec above = keys > low ? keys : IVec{} + INT32_MAX;
    next = above < next ? above : next;
  }
  int32_t border = next[0];
  for (int i = 1; i < kWidth; ++i) border = next[i] < border ? next[i] : border;
  for (int64_t v = 0; v < padded; v += kWidth) ties -= keys_of(load(logits + v)) == border;
  int64_t equal = 0;
  for (int i = 0; i < kWidth; ++i) equal += ties[i];
  if (equal < 2) return border;
  float left = budget - sum_up_to(logits, probabilities, padded, low);
  for (int64_t v = 0; v < padded && equal > 1; ++v) {
    if (key_of(logits[v]) != border) continue;
    left -= probabilities[v];
    if (left < 0) break;
    logits[v] = -kInfinity;
    equal -= 1;
  }
  return border;
}

// ---- the draw ---------------------------------------------------------------------------------------------------

// The high and the low half of the product of 32 × 32 bits in every lane.
VAR_INLINE void multiply(UVec x, uint32_t factor, UVec& high, UVec& low) {
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi32(int(factor)), v = (__m512i)x;
  const __m512i even = _mm512_mul_epu32(v, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), f);
  high = (UVec)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low = (UVec)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i f = _mm256_set1_epi32(int(factor)), v = (__m256i)x;
  const __m256i even = _mm256_mul_epu32(v, f), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), f);
  high = (UVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (UVec)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < kWidth; ++i) high[i] = uint32_t(uint64_t(x[i]) * factor >> 32);
  low = x * factor;
#endif
}

// The four words of the counters (first, position, 0, 0).
VAR_INLINE void philox(UVec first, uint32_t position, uint64_t seed, UVec (&x)[4]) {
  x[0] = first;
  x[1] = UVec{} + position;
  x[2] = x[3] = UVec{};
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxKey0, key1 += kPhiloxKey1) {
    UVec high0, low0, high1, low1;
    multiply(x[0], kPhiloxFactor0, high0, low0);
    multiply(x[2], kPhiloxFactor1, high1, low1);
    x[0] = high1 ^ x[1] ^ key0;
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ key1;
    x[3] = low0;
  }
}

// Exponential variates -log(1 - u) with u = (word + 1/2) · 2^-32, exact to rounding for small u as well.
VAR_INLINE Vec exponential(UVec word) {
  // The upper and the lower half of a word are exact in fp32, and may be converted as signed integers.
  const Vec whole = __builtin_convertvector((IVec)(word >> 16), Vec) * 65536.0f +
                    __builtin_convertvector((IVec)(word & 0xffffu), Vec);
  const Vec u = whole * 0x1p-32f + 0x1p-33f;
  const Vec rest = 1.0f - u;  // may round to 1, or to 0
  return rest == 1.0f ? u : log_v(rest) * u / (rest - 1.0f);
}

// The largest probability / noise so far in every lane, and its index; of equal ones the first.
struct Winner {
  Vec score = splat(-1.0f);
  IVec at{};
  VAR_INLINE void compete(Vec probability, Vec noise, IVec kept, IVec index) {
    const Vec challenger = probability / noise;
    const IVec wins = kept & (challenger > score);  // never NaN
    score = wins ? challenger : score;
    at = wins ? index : at;
  }
  int64_t token() const {
    int64_t best = 0;
    float best_score = -1.0f;
    for (int i = 0; i < kWidth; ++i)
      if (score[i] > best_score || (score[i] == best_score && score[i] >= 0 && at[i] < best))
        best_score = score[i], best = at[i];
    return best;
  }
};

template <class T>
void sample_row(const SampleTokens& a, int64_t row, float* scratch) {
  const int64_t sample = row / a.length, token = row % a.length, padded = round_up(a.vocab, 64);
  float *logits = scratch, *probabilities = scratch + padded;
  const auto row_of = [&](const Rows& rows) {
    return (const T*)rows.data + sample * rows.per_sample + token * rows.per_token;
  };
  const T* unconditional = a.unconditional.data == nullptr ? nullptr : row_of(a.unconditional);
  const float largest = guided_logits(a, row_of(a.conditional), unconditional, padded, logits);
  if (largest == -kInfinity) {
    a.tokens[row] = 0;
    return;
  }
  int32_t key = kKeyOfMinusInfinity + 1;
  const int32_t largest_key = key_of(largest);
  if (a.top_k > 0) key = max_i(key, top_k_key(logits, padded, a.top_k, kKeyOfMinusInfinity, largest_key));
  const float total = probabilities_of(logits, padded, key, largest, probabilities);
  if (a.dropped >= 0) key = top_p_key(logits, probabilities, padded, a.dropped * total, key, largest_key);

  Winner winner;
  IVec lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i;
  const auto compete = [&](int64_t v, Vec noise) VAR_LAMBDA {
    winner.compete(load(probabilities + v), noise, keys_of(load(logits + v)) >= key, lanes + int32_t(v));
  };
  if (a.noise != nullptr) {
    const float* noise = a.noise + row * a.vocab;
    int64_t v = 0;
    for (; v + kWidth <= a.vocab; v += kWidth) compete(v, load(noise + v));
    if (v < a.vocab) compete(v, load_tail(noise + v, a.vocab - v));  // the other lanes have 0/0, which never wins
  } else {
    const uint32_t position = uint32_t(a.offset + token);
    const uint64_t seed = uint64_t(a.seeds[sample]);
    for (int64_t block = 0; block < padded; block += 64)
      for (int64_t part = 0; part < 16; part += kWidth) {
        UVec words[4];
        philox((UVec)lanes + uint32_t(block / 4 + part), position, seed, words);
        for (int word = 0; word < 4; ++word) compete(block + word * 16 + part, exponential(words[word]));
      }
  }
  a.tokens[row] = winner.token();
}

}  // namespace

extern const SampleTokensTable sample_tokens_table;
const SampleTokensTable sample_tokens_table = {{sample_row<float>, sample_row<bf16>, sample_row<fp16>}};

}  // namespace var_kernels::VAR_ISA
