// What forward and backward share: tile sizes, conversion and packing into fp32, and which elements are visible.
#pragma once
#include <utility>

#include "block_causal_attention.h"
#include "gemm.h"

namespace var_kernels::VAR_ISA {

constexpr int64_t kStrip = 64;   // keys of one transposed strip [D][kStrip]: 16 KiB at D = 64, so it stays in L1
constexpr int64_t kBlock = 128;  // keys per step; scores of a tile take 27 KiB
constexpr int64_t kScoreRow = kBlock + kWidth;  // not a power of two: rows must not share their cache sets

constexpr int64_t kChain = 96;  // longest sum over D without an intermediate result

template <class T>
VAR_INLINE T* row_of(const HeadRows& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}

// dst (rows, padded) = factor · src (rows, dim); columns from dim on are zero.
template <class T>
inline void load_rows(const T* src, int64_t src_row, int64_t rows, int64_t dim, float factor, float* dst,
                      int64_t padded) {
  const int64_t whole = dim / kWidth * kWidth;
  for (int64_t r = 0; r < rows; ++r, src += src_row, dst += padded) {
    for (int64_t d = 0; d < whole; d += kWidth) store(dst + d, load(src + d) * factor);
    if (whole < dim) store(dst + whole, load_tail(src + whole, dim - whole) * factor);
  }
}

// dst (rows, dim) = factor · src (rows, padded).
template <class T>
inline void store_rows(const float* src, int64_t padded, int64_t rows, int64_t dim, float factor, T* dst,
                       int64_t dst_row) {
  const int64_t whole = dim / kWidth * kWidth;
  for (int64_t r = 0; r < rows; ++r, src += padded, dst += dst_row) {
    for (int64_t d = 0; d < whole; d += kWidth) store(dst + d, load(src + d) * factor);
    if (whole < dim) store_tail(dst + whole, load(src + whole) * factor, dim - whole);
  }
}

// dst [dim][kStrip] = the transposed src (keys, dim), keys <= kStrip. Columns are zero up to the next whole vector.
template <class T>
inline void pack_strip(const T* src, int64_t src_row, int64_t keys, int64_t dim, float* dst) {
  for (int64_t key = 0; key < keys; key += kWidth)
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t width = min_i(dim - d, kWidth);
      Vec rows[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const T* at = src + (key + i) * src_row + d;
        rows[i] = key + i >= keys ? Vec{} : width == kWidth ? load(at) : load_tail(at, width);
      }
      transpose_step<kWidth / 2>(rows);
      for (int i = 0; i < width; ++i) store(dst + (d + i) * kStrip + key, rows[i]);
    }
}

// scores (rows, columns up to the next whole vector) = a (rows, dim) · strips: the keys of one block. The error of a
// score is the relative error of its probability, so a wide head is summed in parts: one chain of 256 multiply-adds
// doubles the error of the whole attention.
inline void multiply_strips(int64_t rows, int64_t columns, int64_t dim, const float* a, int64_t a_row,
                            const float* strips, float* scores) {
  const int64_t parts = (dim + kChain - 1) / kChain, part = (dim + parts - 1) / parts;
  for (int64_t c = 0; c < columns; c += kStrip)
    for (int64_t d = 0; d < dim; d += part)
      gemm(rows, round_up(min_i(columns - c, kStrip), kWidth), min_i(part, dim - d), a + d, a_row, 1,
           strips + c * dim + d * kStrip, kStrip, scores + c, kScoreRow, d > 0);
}

// Of the columns keys of a block that starts at key_begin, a query row that sees the keys [0, visible) sees so many.
VAR_INLINE int64_t seen_in_block(int64_t visible, int64_t key_begin, int64_t columns) {
  return max_i(0, min_i(visible - key_begin, columns));
}

// Overwrite the columns [seen, end) of a row.
VAR_INLINE void hide(float* row, int64_t seen, int64_t end, float value) {
  for (int64_t c = seen; c < end; ++c) row[c] = value;
}

}  // namespace var_kernels::VAR_ISA
