// Small matrix product for operands that already sit in cache: C (M, N) = [C +] A (M, K) · B (K, N), all fp32.
//
// Every dense product inside our kernels is this one: scores, P·V and the five products of the attention backward,
// code distances, the φ convolutions (one call per tap). A is read one scalar at a time and broadcast, so its two
// strides are free and transposed operands cost nothing; B and C rows are vectors, so N is a multiple of kWidth and
// callers pad. A product is summed from zero and then added to C, so that a long sum made of several products does
// not round like one chain. The register tile is MR rows by NV vectors: MR·NV accumulators, NV vectors of B and one
// broadcast fill the register file (32 registers with AVX-512, 16 before) and keep both FMA ports busy from L1.
#pragma once
#include "isa.h"

namespace var_kernels::VAR_ISA {

constexpr int kRows = 6;
constexpr int kVectors = kWidth == 16 ? 4 : 2;

template <int MR, int NV>
VAR_INLINE void gemm_tile(int64_t K, const float* VAR_RESTRICT a, int64_t a_row, int64_t a_k,
                          const float* VAR_RESTRICT b, int64_t b_k, float* VAR_RESTRICT c, int64_t c_row,
                          bool accumulate) {
  Vec acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
  for (int64_t k = 0; k < K; ++k) {
    Vec bv[NV];
    for (int j = 0; j < NV; ++j) bv[j] = load(b + k * b_k + j * kWidth);
    for (int i = 0; i < MR; ++i) {
      const Vec av = splat(a[i * a_row + k * a_k]);
      for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) {
      float* at = c + i * c_row + j * kWidth;
      store(at, accumulate ? load(at) + acc[i][j] : acc[i][j]);
    }
}

// All M rows of one column strip of NV vectors: the strip of B stays in L1 while the rows stream past it.
template <int NV>
inline void gemm_strip(int64_t M, int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b, int64_t b_k,
                       float* c, int64_t c_row, bool accumulate) {
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows)
    gemm_tile<kRows, NV>(K, a + m * a_row, a_row, a_k, b, b_k, c + m * c_row, c_row, accumulate);
  const float* at = a + m * a_row;
  float* ct = c + m * c_row;
  switch (M - m) {
    case 5: return gemm_tile<5, NV>(K, at, a_row, a_k, b, b_k, ct, c_row, accumulate);
    case 4: return gemm_tile<4, NV>(K, at, a_row, a_k, b, b_k, ct, c_row, accumulate);
    case 3: return gemm_tile<3, NV>(K, at, a_row, a_k, b, b_k, ct, c_row, accumulate);
    case 2: return gemm_tile<2, NV>(K, at, a_row, a_k, b, b_k, ct, c_row, accumulate);
    case 1: return gemm_tile<1, NV>(K, at, a_row, a_k, b, b_k, ct, c_row, accumulate);
    default: return;
  }
}

inline void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_row, int64_t a_k, const float* b,
                 int64_t b_k, float* c, int64_t c_row, bool accumulate) {
  constexpr int64_t strip = kVectors * kWidth;
  int64_t n = 0;
  for (; n + strip <= N; n += strip) gemm_strip<kVectors>(M, K, a, a_row, a_k, b + n, b_k, c + n, c_row, accumulate);
  if (kVectors == 4 && n + 2 * kWidth <= N) {
    gemm_strip<2>(M, K, a, a_row, a_k, b + n, b_k, c + n, c_row, accumulate);
    n += 2 * kWidth;
  }
  if (n < N) gemm_strip<1>(M, K, a, a_row, a_k, b + n, b_k, c + n, c_row, accumulate);
}

}  // namespace var_kernels::VAR_ISA
