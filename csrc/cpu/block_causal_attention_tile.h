// Functions that the forward and the backward of block_causal_attention share: conversion and transposition into
// operands, and which elements are visible.
//
// Both work on the transposed scores Sᵀ = K Qᵀ: a row is a key, and the query rows of a tile lie side by side in the
// lanes. Row maxima, sums and the log-sum-exp are then vectors with one element per lane. K and V are the scalars of
// gemm.h and are read where they are, without packing.
#pragma once
#include <utility>

#include "block_causal_attention.h"
#include "tiles.h"

namespace var_kernels::VAR_ISA {

constexpr int64_t kChain = 96;  // the longest sum over D without an intermediate result

template <class T>
VAR_INLINE T* row_of(const HeadRows& x, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + row * x.row;
}

// Divides scratch memory among its users. Without memory (base is null) it only counts the floats that are needed.
struct Scratch {
  float* base;
  int64_t taken = 0;

  float* take(int64_t floats) {
    float* memory = base ? base + taken : nullptr;
    taken += round_up(floats, 16);
    return memory;
  }
  Pair* take_pairs(int64_t pairs) { return reinterpret_cast<Pair*>(take(pairs)); }
};

// dst (rows, padded) = factor · src (rows, dim); columns from dim to the end of its vector are zero.
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

// dst [dim][lanes] = factor · src (rows, dim), transposed; lanes from `rows` on are zero.
template <class T>
inline void load_transposed(const T* src, int64_t src_row, int64_t rows, int64_t dim, float factor, float* dst,
                            int64_t lanes) {
  for (int64_t r = 0; r < lanes; r += kWidth)
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t width = min_i(dim - d, kWidth);
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const T* at = src + (r + i) * src_row + d;
        block[i] = r + i >= rows ? Vec{} : (width == kWidth ? load(at) : load_tail(at, width)) * factor;
      }
      transpose_step<kWidth / 2>(block);
      for (int i = 0; i < width; ++i) store(dst + (d + i) * lanes + r, block[i]);
    }
}

// dst (rows, dim) = src [dim up to the next whole vector][lanes], transposed, row r times factor[r].
template <class T>
inline void store_transposed(const float* src, int64_t lanes, int64_t rows, int64_t dim, const float* factor, T* dst,
                             int64_t dst_row) {
  for (int64_t r = 0; r < rows; r += kWidth)
    for (int64_t d = 0; d < dim; d += kWidth) {
      const int64_t width = min_i(dim - d, kWidth), count = min_i(rows - r, kWidth);
      Vec block[kWidth];
      for (int i = 0; i < kWidth; ++i) block[i] = load(src + (d + i) * lanes + r) * load(factor + r);
      transpose_step<kWidth / 2>(block);
      for (int i = 0; i < count; ++i) {
        T* at = dst + (r + i) * dst_row + d;
        if (width == kWidth)
          store(at, block[i]);
        else
          store_tail(at, block[i], width);
      }
    }
}

// Sᵀ (keys, lanes) = rows (keys, dim) · columns [dim][lanes]. The absolute error of a score is the relative error of
// its probability, so a wide head is summed in parts: one chain of 256 multiply-adds doubles the error of the
// attention.
inline void multiply_rows(int64_t keys, int64_t lanes, int64_t dim, const float* rows, int64_t row,
                          const float* columns, float* scores) {
  const int64_t parts = (dim + kChain - 1) / kChain, part = (dim + parts - 1) / parts;
  for (int64_t d = 0; d < dim; d += part)
    gemm(keys, lanes, min_i(part, dim - d), rows + d, row, 1, columns + d * lanes, lanes, scores, lanes, d > 0);
}

// How many of the `columns` keys of a block, which starts at key_begin, a query row sees that sees the keys [0,
// visible).
VAR_INLINE int64_t seen_in_block(int64_t visible, int64_t key_begin, int64_t columns) {
  return max_i(0, min_i(visible - key_begin, columns));
}

// The first row that sees more than `keys` keys; `rows` if there is none. `visible` never decreases with the row.
VAR_INLINE int64_t first_row_beyond(const int64_t* visible, int64_t rows, int64_t keys) {
  int64_t r = 0;
  while (r < rows && visible[r] <= keys) ++r;
  return r;
}

// Overwrites the lanes [0, count) of a row of lanes.
VAR_INLINE void fill(float* row, int64_t count, float value) {
  for (int64_t r = 0; r < count; ++r) row[r] = value;
}

}  // namespace var_kernels::VAR_ISA
