// Makes the bf16 operands of block_causal_attention for products of pairs (gemm.h, tiles.h). They are padded with zeros
// to whole tiles.
#pragma once
#include "block_causal_attention_tile.h"

#if defined(__AVX512BF16__)

namespace var_kernels::VAR_ISA {

constexpr int64_t kStep = 32;  // bf16 numbers along the summed dimension in one product of AMX tiles

VAR_INLINE Vec load_pairs(const bf16* p, int64_t count) {  // lanes beyond `count` bf16 numbers are zero
  if (count >= 32) return load(reinterpret_cast<const Pair*>(p));
  return (Vec)_mm512_maskz_loadu_epi16((1u << max_i(count, 0)) - 1u, p);
}

VAR_INLINE void store(Pair* p, Vec v) { memcpy(p, &v, sizeof v); }

// dst (rows up to the next multiple of 16, padded / 2) = src (rows, dim). padded is dim rounded up to whole steps.
inline void copy_rows(const bf16* src, int64_t src_row, int64_t rows, int64_t dim, Pair* dst) {
  const int64_t words = round_up(dim, kStep) / 2;
  for (int64_t r = 0; r < round_up(rows, 16); ++r, src += src_row, dst += words)
    for (int64_t d = 0; d < dim; d += kStep) store(dst + d / 2, r < rows ? load_pairs(src + d, dim - d) : Vec{});
}

// dst [padded / 2][lanes] = src (rows, dim) as pairs along dim, transposed. Every pair is XORed with `sign`.
inline void load_pairs_transposed(const bf16* src, int64_t src_row, int64_t rows, int64_t dim, uint32_t sign, Pair* dst,
                                  int64_t lanes) {
  for (int64_t r = 0; r < lanes; r += kWidth)
    for (int64_t d = 0; d < dim; d += kStep) {
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i)
        block[i] = r + i < rows ? as_float(as_bits(load_pairs(src + (r + i) * src_row + d, dim - d)) ^ sign) : Vec{};
      transpose_step<kWidth / 2>(block);
      for (int i = 0; i < kWidth; ++i) store(dst + (d / 2 + i) * lanes + r, block[i]);
    }
}

// 16 bf16 numbers of each of two rows as pairs (low row, high row). Rows that do not exist are zero.
VAR_INLINE Vec pair_rows(const bf16* low, int64_t src_row, int64_t rows, int64_t count) {
  const auto wide = [count](const bf16* p) VAR_LAMBDA {
    return as_bits(count >= kWidth ? load(p) : load_tail(p, count));  // the bf16 in the upper half of each lane
  };
  const UVec first = rows > 0 ? wide(low) : UVec{}, second = rows > 1 ? wide(low + src_row) : UVec{};
  return as_float(first >> 16 | second);
}

// dst [dim up to a multiple of 16][row words] = src (keys, dim), transposed into pairs along the keys, for one step of
// keys. Elements beyond `keys` are zero.
inline void load_step_transposed(const bf16* src, int64_t src_row, int64_t keys, int64_t dim, Pair* dst, int64_t row) {
  for (int64_t d = 0; d < dim; d += kWidth) {
    Vec block[kWidth];
    for (int i = 0; i < kWidth; ++i)
      block[i] = pair_rows(src + 2 * i * src_row + d, src_row, keys - 2 * i, dim - d);
    transpose_step<kWidth / 2>(block);
    for (int i = 0; i < kWidth; ++i) store(dst + (d + i) * row, block[i]);
  }
}

// dst [rows up to whole steps / 2][padded] = src (rows, dim) as pairs along the rows. padded is dim rounded up to 16.
inline void load_row_pairs(const bf16* src, int64_t src_row, int64_t rows, int64_t dim, Pair* dst) {
  const int64_t padded = round_up(dim, kWidth);
  for (int64_t r = 0; r < round_up(rows, kStep); r += 2, dst += padded)
    for (int64_t d = 0; d < dim; d += kWidth) store(dst + d, pair_rows(src + r * src_row + d, src_row, rows - r, dim - d));
}

// The transposed keys (or values) of a task, in blocks of kBlock keys. A block is
// [dim up to a multiple of 16][kBlock / 2].
template <int64_t kBlock>
struct TransposedBlocks {
  static constexpr int64_t kRow = kBlock / 2;

  static int64_t words(int64_t keys, int64_t dim) { return round_up(keys, kBlock) / 2 * round_up(dim, 16); }

  static void pack(const bf16* src, int64_t src_row, int64_t keys, int64_t dim, Pair* dst) {
    const int64_t block_words = kRow * round_up(dim, 16);
    for (int64_t key = 0; key < keys; key += kStep)
      load_step_transposed(src + key * src_row, src_row, min_i(keys - key, kStep), dim,
                           dst + key / kBlock * block_words + key % kBlock / 2, kRow);
  }

  // out [dim][lanes] += the keys [begin, end) of one block times p [kBlock / 2][lanes]. The steps at the two ends are
  // multiplied from a copy in which the other keys are zero: their p are 0, but 0 · NaN would let an invisible key into
  // the sum.
  static void multiply(const Pair* block, int64_t dim, int64_t begin, int64_t end, const Pair* p, int64_t lanes,
                       Pair* step_copy, float* out) {
    const int64_t rows = round_up(dim, 16);
    for (int64_t key = begin / kStep * kStep; key < end; key += kStep) {
      const Pair* a = block + key / 2;
      int64_t a_row = kRow, next = key + kStep;
      if (key < begin || next > end) {
        const __mmask32 seen = uint32_t((uint64_t{1} << min_i(end - key, kStep)) - (uint64_t{1} << max_i(begin - key, 0)));
        for (int64_t d = 0; d < rows; ++d)
          _mm512_storeu_si512(step_copy + d * kStep / 2, _mm512_maskz_loadu_epi16(seen, a + d * a_row));
        a = step_copy;
        a_row = kStep / 2;
      } else {
        next = end / kStep * kStep;
      }
      gemm(rows, lanes, (next - key) / 2, a, a_row, 1, p + key / 2 * lanes, lanes, out, lanes, true);
      key = next - kStep;
    }
  }
};

}  // namespace var_kernels::VAR_ISA

#endif
