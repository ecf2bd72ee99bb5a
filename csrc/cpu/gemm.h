// Small matrix product for operands that already sit in cache: C (M, N) = [C +] A (M, K) · B (K, N).
//
// Most dense products of our kernels use it: scores, P·V and the five products of the attention backward, the φ
// convolutions (one call per row of taps), linear layers and 3×3 convolutions. A is read one scalar at a time and
// broadcast, so its two strides may have any value, and transposed operands cost nothing. Rows of B and C are vectors,
// so N is a multiple of kWidth and callers pad. A product is summed from zero and then added to C, so that a long sum
// made of several products does not round like one chain.
//
// A scalar is a float, or with AVX512-BF16 a Pair: two neighbours along K, multiplied and added by one instruction. The
// register tile is MR rows by NV vectors: MR·NV accumulators, NV vectors of B and one broadcast fill the register file
// (32 registers with AVX-512 and NEON, else 16). Three vectors and eight rows need 11 loads for 24 multiply-adds. The
// split into rows and columns changes no sum.
#pragma once
#include "isa.h"

namespace var_kernels::VAR_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kAccumulators = 24;
#else
constexpr int kAccumulators = 12;
#endif

// Two bf16 numbers in the order of memory.
struct Pair {
  uint32_t bits;
};

// The type of the elements in memory that make up a scalar, and their number.
template <class S>
struct Stored {
  using Element = S;
};
template <>
struct Stored<Pair> {
  using Element = bf16;
};
template <class S>
constexpr int64_t kPerScalar = sizeof(S) / sizeof(typename Stored<S>::Element);

VAR_INLINE Vec broadcast(const float* p) { return splat(*p); }
VAR_INLINE Vec multiply_add(Vec a, Vec b, Vec sum, const float*) { return a * b + sum; }
#if defined(__AVX512BF16__)
VAR_INLINE Vec load(const Pair* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
// Two rows as pairs: lane i holds (low[i], high[i]).
VAR_INLINE Vec interleave(Vec low, Vec high) {
  alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)both);
}
VAR_INLINE Vec broadcast(const Pair* p) { return as_float(UVec{} + p->bits); }
VAR_INLINE Vec multiply_add(Vec a, Vec b, Vec sum, const Pair*) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// Prefetches into the second-level cache during a product: none, or one line at each step along K.
struct NothingAhead {
  VAR_INLINE void fetch(int64_t) const {}
  VAR_INLINE void advance(int64_t) {}
};
struct LinesAhead {
  const char *at = nullptr, *last = nullptr;

  LinesAhead() = default;
  // Fetches B of the next product, which is (K, N) like that of this one, as far as it lies before `end`. If there are
  // more steps than lines, the last K lines are fetched again: later lines would evict data that this product reads.
  template <class S>
  VAR_INLINE LinesAhead(const S* next, const S* end, int64_t K, int64_t N)
      : at((const char*)next), last((const char*)(end - next > K * N ? next + K * N : end) - K * 64) {
    if (at > last) at = last;
  }
  VAR_INLINE void fetch(int64_t k) const { __builtin_prefetch(at + k * 64, 0, 2); }
  VAR_INLINE void advance(int64_t K) { at = last - at > K * 64 ? at + K * 64 : last; }
};

template <int MR, int NV, class S, class Ahead>
VAR_INLINE void gemm_tile(int64_t K, const S* VAR_RESTRICT a, int64_t a_row, int64_t a_k, const S* VAR_RESTRICT b,
                          int64_t b_k, float* VAR_RESTRICT c, int64_t c_row, bool accumulate, Ahead& ahead) {
  Vec acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
  for (int64_t k = 0; k < K; ++k) {
    Vec bv[NV];
    for (int j = 0; j < NV; ++j) bv[j] = load(b + k * b_k + j * kWidth);
    ahead.fetch(k);
    for (int i = 0; i < MR; ++i) {
      const Vec av = broadcast(a + i * a_row + k * a_k);
      for (int j = 0; j < NV; ++j) acc[i][j] = multiply_add(av, bv[j], acc[i][j], a);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) {
      float* at = c + i * c_row + j * kWidth;
      store(at, accumulate ? load(at) + acc[i][j] : acc[i][j]);
    }
  ahead.advance(K);
}

// All M rows of one strip of NV vectors of columns, in register tiles of MR rows and then of 8, 4, 2 and 1.
template <int MR, int NV, class S, class Ahead>
VAR_INLINE void gemm_rows(int64_t& m, int64_t M, int64_t K, const S* a, int64_t a_row, int64_t a_k, const S* b,
                          int64_t b_k, float* c, int64_t c_row, bool accumulate, Ahead& ahead) {
  for (; m + MR <= M; m += MR)
    gemm_tile<MR, NV>(K, a + m * a_row, a_row, a_k, b, b_k, c + m * c_row, c_row, accumulate, ahead);
}
template <int NV, class S, class Ahead>
inline void gemm_strip(int64_t M, int64_t K, const S* a, int64_t a_row, int64_t a_k, const S* b, int64_t b_k, float* c,
                       int64_t c_row, bool accumulate, Ahead& ahead) {
  constexpr int rows = NV == 1 ? 12 : kAccumulators / NV;
  int64_t m = 0;
  gemm_rows<rows, NV>(m, M, K, a, a_row, a_k, b, b_k, c, c_row, accumulate, ahead);
  if constexpr (rows > 8) gemm_rows<8, NV>(m, M, K, a, a_row, a_k, b, b_k, c, c_row, accumulate, ahead);
  if constexpr (rows > 4) gemm_rows<4, NV>(m, M, K, a, a_row, a_k, b, b_k, c, c_row, accumulate, ahead);
  gemm_rows<2, NV>(m, M, K, a, a_row, a_k, b, b_k, c, c_row, accumulate, ahead);
  gemm_rows<1, NV>(m, M, K, a, a_row, a_k, b, b_k, c, c_row, accumulate, ahead);
}

template <class S, class Ahead = NothingAhead>
inline void gemm(int64_t M, int64_t N, int64_t K, const S* a, int64_t a_row, int64_t a_k, const S* b, int64_t b_k,
                 float* c, int64_t c_row, bool accumulate, Ahead ahead = {}) {
  for (int64_t n = 0; n < N;) {
    const int64_t vectors = (N - n) / kWidth;
    if (vectors == 3 || vectors > 4) {
      gemm_strip<3>(M, K, a, a_row, a_k, b + n, b_k, c + n, c_row, accumulate, ahead);
      n += 3 * kWidth;
    } else if (vectors >= 2) {
      gemm_strip<2>(M, K, a, a_row, a_k, b + n, b_k, c + n, c_row, accumulate, ahead);
      n += 2 * kWidth;
    } else {
      gemm_strip<1>(M, K, a, a_row, a_k, b + n, b_k, c + n, c_row, accumulate, ahead);
      n += kWidth;
    }
  }
}

}  // namespace var_kernels::VAR_ISA
