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

template <class T>
VAR_INLINE Vec some(const T* p, int64_t count) {
  return count >= kWidth ? load(p) : load_tail(p, count);
}

// kWidth scalars of the packed type from elements of the weight, of which `count` > 0 are left.
template <class T>
VAR_INLINE Vec scalars_from(const T* p, int64_t count, const float*) {
  return some(p, count);
}
#if defined(__AVX512BF16__)
template <class T>
VAR_INLINE Vec scalars_from(const T* p, int64_t count, const Pair*) {
  const Vec low = some(p, count), high = count > kWidth ? some(p + kWidth, count - kWidth) : Vec{};
  return (Vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
#endif

// Memory is the limit. Sixteen rows of the weight are read at a time, as streams that the processor prefetches, and
// each line of the strip is written once, past the caches.
template <class T, class S>
void pack(const void* weight, int64_t outputs, int64_t inputs, int64_t column, int64_t width, void* packed) {
  constexpr int64_t kLine = 64 / sizeof(float), kElements = kWidth * kPerScalar<S>;
  const int64_t scalars = (inputs + kPerScalar<S> - 1) / kPerScalar<S>;
  float* const strip = (float*)packed + column * scalars;
  for (int64_t line = 0; line < width; line += kLine)
    for (int64_t k = 0; k < inputs; k += kElements)
      for (int64_t part = line; part < line + kLine; part += kWidth) {
        Vec block[kWidth];
        for (int i = 0; i < kWidth; ++i) {
          const int64_t row = column + part + i;
          block[i] = row < outputs ? scalars_from((const T*)weight + row * inputs + k, inputs - k, (const S*)nullptr)
                                   : Vec{};
        }
        transpose_step<kWidth / 2>(block);
        float* to = strip + k / kPerScalar<S> * width + part;
        const int64_t count = min_i(kWidth, scalars - k / kPerScalar<S>);
        for (int i = 0; i < kWidth; ++i)
          if (i < count) stream(to + i * width, block[i]);
      }
  stream_fence();
}

#if defined(__AVX512BF16__)
#define VAR_PAIRS strip<Pair>
#define VAR_PACK(T) {pack<T, float>, pack<T, Pair>}
#else
#define VAR_PAIRS nullptr
#define VAR_PACK(T) {pack<T, float>, nullptr}
#endif

}  // namespace

extern const PackedLinearTable packed_linear_table;
const PackedLinearTable packed_linear_table = {{strip<float>, VAR_PAIRS}, {VAR_PACK(float), VAR_PACK(bf16)}};

}  // namespace var_kernels::VAR_ISA
