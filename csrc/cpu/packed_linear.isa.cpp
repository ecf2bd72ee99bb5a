// y = x·Wᵀ + b, optionally followed by tanh-GELU, with W packed by strips of columns.
//
// Arithmetic is the limit, and for few rows the bytes of W. A strip stays in the second-level cache while the rows of a
// block are multiplied with it; the rows are read where they are. Meanwhile each line of the next strip is fetched
// once. Without this the products of the first rows would wait for memory, and those of the others would leave it idle.
#include "packed_linear.h"

#include "gemm.h"

namespace var_kernels::VAR_ISA {
namespace {

// 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), computed as x / (1 + 2^t).
template <class T>
VAR_INLINE Vec gelu(Vec x) {
  constexpr float kFactor = -2 * 0.7978845608f * kLog2E;
  const Vec t = x * (x * x * (kFactor * 0.044715f) + kFactor);
  const Vec denominator = exp2_v<sizeof(T) == 2 ? 3 : 5>(min_v(t, splat(126.0f))) + 1.0f;
  return t < 126.0f || t != t ? x / denominator : x * 0.0f;
}

template <class S>
void strip(const PackedLinear& a, int64_t first, int64_t count, int64_t column, int64_t width, float* scratch) {
  using T = typename Stored<S>::Element;
  constexpr int64_t kDepth = kLinearDepthBytes / sizeof(S);
  const int64_t depth = a.depth / kPerScalar<S>;
  const S *x = (const S*)a.x + first * depth, *weight = (const S*)a.weight, *w = weight + column * depth;
  const S* const end = weight + a.columns * depth;
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t part = min_i(kDepth, depth - k);
    const S* block = w + k * width;
    gemm(count, width, part, x + k, depth, int64_t{1}, block, width, scratch, width, k > 0,
         LinesAhead(block + part * width, end, part, width));
  }

  const int64_t columns = min_i(width, a.out_features - column);
  for (int64_t r = 0; r < count; ++r) {
    T* y = (T*)a.y + (first + r) * a.out_features + column;
    for (int64_t c = 0; c < columns; c += kWidth) {
      Vec v = load(scratch + r * width + c) + load(a.bias + column + c);
      if (a.gelu) v = gelu<T>(v);
      if (c + kWidth <= columns)
        store(y + c, v);
      else
        store_tail(y + c, v, columns - c);
    }
  }
}

#if defined(__AVX512BF16__)
#define VAR_PAIRS strip<Pair>
#else
#define VAR_PAIRS nullptr
#endif

}  // namespace

extern const PackedLinearTable packed_linear_table;
const PackedLinearTable packed_linear_table = {{strip<float>, VAR_PAIRS}};

}  // namespace var_kernels::VAR_ISA
