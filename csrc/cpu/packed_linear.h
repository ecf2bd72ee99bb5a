// What the door of packed_linear (packed_linear.cpp) and its vector code (packed_linear.isa.cpp) share.
#pragma once
#include <cstdint>

namespace var_kernels {

// Columns of the packed weights that lie together: three vectors of AVX-512, which its register tile wants. They begin
// anew after each group, so that two threads find the same number of columns; numbers of columns are rounded up.
constexpr int64_t kLinearStrip = 48, kLinearGroup = 512, kLinearColumns = 16;
// Bytes of a row of x and of the packed weights that are multiplied at a time: a strip of those stays in the
// second-level cache, and fp32 sums do not round like one long chain.
constexpr int64_t kLinearDepthBytes = 2048;
// Rows of x that meet a strip: they stay in the second-level cache beside it.
constexpr int64_t kLinearRows = 240;

// Columns of the strip that begins at this one.
constexpr int64_t linear_strip(int64_t column, int64_t columns) {
  const int64_t group = kLinearGroup - column % kLinearGroup, left = columns - column < group ? columns - column : group;
  return left == 64 ? 32 : left < kLinearStrip ? left : kLinearStrip;
}

struct PackedLinear {
  const void* x;       // (rows, depth), dense
  const void* weight;  // by strips, in each (depth, strip); bf16: (depth / 2, strip, 2)
  const float* bias;   // (columns,)
  void* y;             // (rows, out_features), dense
  int64_t depth, columns, out_features;
  bool gelu;
};

struct PackedLinearTable {
  // Rows [first, first + count) of one strip. Scratch is (count, strip) floats. For float and for bf16; null where this
  // level has no product of bf16.
  void (*strip[2])(const PackedLinear&, int64_t first, int64_t count, int64_t column, int64_t strip, float* scratch);
};

}  // namespace var_kernels
