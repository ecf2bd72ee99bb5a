// Declarations that the C++ entry of packed_linear (packed_linear.cpp) and its vector code (packed_linear.isa.cpp)
// share.
#pragma once
#include <cstdint>

namespace var_kernels {

// The columns of a strip of packed weights: three vectors of AVX-512, as the register tile needs. After each group a
// new strip begins, so that two threads have the same number of columns. The number of columns is rounded up to a
// multiple of kLinearColumns.
constexpr int64_t kLinearStrip = 48, kLinearGroup = 512, kLinearColumns = 16;
// The bytes of a row of x, and of a column of the packed weights, that are multiplied at a time: so much of a strip
// stays in the second-level cache, and fp32 sums do not round like one long chain.
constexpr int64_t kLinearDepthBytes = 2048;
// The largest number of rows of x that are multiplied with a strip: they stay in the second-level cache beside it.
constexpr int64_t kLinearRows = 240;

// The number of columns of the strip that begins at this column.
constexpr int64_t linear_strip(int64_t column, int64_t columns) {
  const int64_t group = kLinearGroup - column % kLinearGroup, left = columns - column < group ? columns - column : group;
  return left == 64 ? 32 : left < kLinearStrip ? left : kLinearStrip;
}

struct PackedLinear {
  const void* x;       // (rows, depth), dense
  const void* weight;  // strip after strip, each (depth, strip) or in bf16 (depth / 2, strip, 2)
  const float* bias;   // (columns,)
  void* y;             // (rows, out_features), dense
  int64_t depth, columns, out_features;
  bool gelu;
};

struct PackedLinearTable {
  // Computes rows [first, first + count) of one strip. Scratch is (count, strip) floats. The entries are for float and
  // for bf16; the latter is null if this level has no product of bf16.
  void (*strip[2])(const PackedLinear&, int64_t first, int64_t count, int64_t column, int64_t strip, float* scratch);
  // Packs one strip of a weight (outputs, inputs), whose dtype is the first index, to the dtype that is the second:
  // 0 for float, 1 for bf16. Columns from `outputs` on, and in bf16 the second number of a last pair, are zero.
  void (*pack[2][2])(const void* weight, int64_t outputs, int64_t inputs, int64_t column, int64_t strip, void* packed);
};

}  // namespace var_kernels
