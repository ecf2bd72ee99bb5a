// Functions that the vector code of the forward and of the backward of multi_scale_quantize share: upsampling codes
// into a bordered map, and the 3×3 convolution of its rows.
#pragma once
#include "gemm.h"
#include "multi_scale_quantize.h"

namespace var_kernels::VAR_ISA {

VAR_INLINE void zero(float* p, int64_t floats) { memset(p, 0, size_t(floats) * sizeof(float)); }

// Copies one code into `padded` floats.
VAR_INLINE void copy_code(const MapShape& s, const float* code, float* out) {
  int64_t c = 0;
  for (; c + kWidth <= s.channels; c += kWidth) store(out + c, load(code + c));
  if (c < s.channels) store(out + c, load_tail(code + c, s.channels - c));
}

// Gathers rows [i0, i1) of the code map into out (i1 - i0, width, padded).
inline void gather_codes(const MapShape& s, const CodeMap& codes, int64_t i0, int64_t i1, float* out) {
  for (int64_t p = i0 * codes.width; p < i1 * codes.width; ++p, out += s.padded)
    copy_code(s, codes.rows + (codes.tokens ? codes.tokens[p] : p) * codes.row_stride, out);
}

// The floats of scratch that upsample_rows needs: code rows, and one of them interpolated along the vertical axis.
inline int64_t upsample_scratch(const MapShape& s, int64_t code_pixels) {
  return 2 * code_pixels * s.padded;
}

// Computes rows [y0 - 1, y1 + 1) of the upsampled codes with their left and right border, (y1 - y0 + 2, width + 2,
// padded); rows outside the map are zero. The vertical direction comes first: a row then needs only its own four code
// rows, so that bands of rows are independent of one another.
inline void upsample_rows(const MapShape& s, const CodeMap& codes, int64_t y0, int64_t y1, float* scratch, float* u) {
  const int64_t row = (s.width + 2) * s.padded, begin = max_i(y0 - 1, 0), end = min_i(y1 + 1, s.height);
  if (y0 == 0) zero(u, row);
  if (y1 == s.height) zero(u + (y1 - y0 + 1) * row, row);
  int64_t i0 = 0;
  float* line = scratch;
  const float* gathered = scratch;
  if (codes.vertical) {
    i0 = codes.vertical[begin].index[0];
    const int64_t i1 = codes.vertical[end - 1].index[3] + 1;
    gather_codes(s, codes, i0, i1, scratch);
    line = scratch + (i1 - i0) * codes.width * s.padded;
  }
  for (int64_t y = begin; y < end; ++y) {
    float* out = u + (y - y0 + 1) * row;
    zero(out, s.padded);
    zero(out + row - s.padded, s.padded);
    out += s.padded;
    if (!codes.vertical) {
      gather_codes(s, codes, y, y + 1, out);
      continue;
    }
    const int64_t code_row = codes.width * s.padded;
    const CubicTaps& v = codes.vertical[y];
    const float* source[4];
    for (int t = 0; t < 4; ++t) source[t] = gathered + (v.index[t] - i0) * code_row;
    for (int64_t c = 0; c < code_row; c += kWidth) {
      Vec sum = load(source[0] + c) * v.weight[0];
      for (int t = 1; t < 4; ++t) sum += load(source[t] + c) * v.weight[t];
      store(line + c, sum);
    }
    for (int64_t x = 0; x < s.width; ++x) {
      const CubicTaps& h = codes.horizontal[x];
      for (int64_t c = 0; c < s.padded; c += kWidth) {
        Vec sum = load(line + h.index[0] * s.padded + c) * h.weight[0];
        for (int t = 1; t < 4; ++t) sum += load(line + h.index[t] * s.padded + c) * h.weight[t];
        store(out + x * s.padded + c, sum);
      }
    }
  }
}

// Computes one row of phi of a bordered map; the row above it starts at `input`. The three taps of a row form one
// product, because the three neighbours of a pixel are consecutive in memory. The identity part is added last: as part
// of the middle tap it would make the partial sums larger, and with them the roundings of the other taps.
inline void phi_row(const MapShape& s, const float* input, const float* packed, float* out) {
  const float* bias = packed + 9 * s.padded * s.padded;
  for (int64_t x = 0; x < s.width; ++x)
    for (int64_t c = 0; c < s.padded; c += kWidth) store(out + x * s.padded + c, load(bias + c));
  for (int64_t dy = 0; dy < 3; ++dy)
    gemm(s.width, s.padded, 3 * s.padded, input + dy * (s.width + 2) * s.padded, s.padded, 1,
         packed + dy * 3 * s.padded * s.padded, s.padded, out, s.padded, true);
  const float* middle = input + (s.width + 3) * s.padded;
  for (int64_t x = 0; x < s.width; ++x)
    for (int64_t c = 0; c < s.padded; c += kWidth) {
      const int64_t i = x * s.padded + c;
      store(out + i, load(out + i) + load(bias + s.padded + c) * load(middle + i));
    }
}

}  // namespace var_kernels::VAR_ISA
