// The vector layer of the CPU kernels: one source, compiled once per instruction set.
//
// A `*.isa.cpp` file includes this header and keeps everything in namespace var_kernels::VAR_ISA. The namespace makes
// several copies safe in one library: the linker keeps one copy of an inline function, and a copy compiled with AVX-512
// must never run on a machine without it. For the same reason these files call no function template of the standard
// library (std::max<float> is such an inline function).
//
// Vectors are GCC/Clang vector extensions, so AVX-512, AVX2, SSE2 and NEON come from the same lines. Intrinsics appear
// only where the compiler does not find the best instruction (half precision, bfloat16 rounding, reductions,
// exponents).
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#pragma GCC diagnostic push
#if !defined(__clang__)  // GCC 12 warns that its own _mm512_undefined_ps() is uninitialised
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define VAR_INLINE inline __attribute__((always_inline))
#define VAR_RESTRICT __restrict__
#define VAR_LAMBDA __attribute__((always_inline))  // for lambdas that run once per vector

namespace var_kernels {

// Storage types of the two 16-bit formats; arithmetic is always fp32.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

namespace VAR_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kWidth)));
using IVec = int32_t __attribute__((vector_size(4 * kWidth)));
using UVec = uint32_t __attribute__((vector_size(4 * kWidth)));
using HVec = uint16_t __attribute__((vector_size(2 * kWidth)));  // one vector of 16-bit storage

constexpr float kInfinity = __builtin_inff();

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
VAR_INLINE int64_t min_i(int64_t a, int64_t b) { return a < b ? a : b; }
VAR_INLINE int64_t max_i(int64_t a, int64_t b) { return a > b ? a : b; }

VAR_INLINE Vec splat(float x) { return x - Vec{}; }  // compiles to a broadcast; x + 0 would not, because it changes -0
VAR_INLINE Vec as_float(UVec v) { return (Vec)v; }
VAR_INLINE UVec as_bits(Vec v) { return (UVec)v; }
VAR_INLINE Vec max_v(Vec a, Vec b) { return a > b ? a : b; }
VAR_INLINE Vec min_v(Vec a, Vec b) { return a < b ? a : b; }

// ---- scalar conversions (tails, portable half precision) -------------------------------------------------------

VAR_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
VAR_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
VAR_INLINE float to_float(float x) { return x; }
VAR_INLINE float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
VAR_INLINE float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // Inf, NaN
  // Multiplying by 2^112 rebiases the exponent and normalises subnormals in one exact step.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
VAR_INLINE void from_float(float x, float* out) { *out = x; }
VAR_INLINE void from_float(float x, bf16* out) {
  const uint32_t u = float_to_bits(x);
  out->bits = x != x ? 0x7fc0u : uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);  // round to nearest even
}
VAR_INLINE void from_float(float x, fp16* out) {
  const uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    h = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    h = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;  // subnormal: adding 0.5 rounds to 2^-24
  } else {
    h = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13;
  }
  out->bits = uint16_t(sign | h);
}

// ---- whole vectors ---------------------------------------------------------------------------------------------

VAR_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
VAR_INLINE Vec load(const bf16* p) {
  // GCC 12 widens by halves, in six instructions, although vpmovzxwd and a shift suffice.
#if defined(__AVX512F__)
  return as_float((UVec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return as_float((UVec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  HVec h;
  memcpy(&h, p, sizeof h);
  return as_float(__builtin_convertvector(h, UVec) << 16);
#endif
}
VAR_INLINE Vec load(const fp16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
VAR_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
VAR_INLINE void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  const auto h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
#else
  const UVec u = as_bits(v);
  UVec r = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  r = v != v ? UVec{} + 0x7fc0u : r;
  const HVec h = __builtin_convertvector(r, HVec);
  memcpy(p, &h, sizeof h);
#endif
}
VAR_INLINE void store(fp16* p, Vec v) {
#if defined(__AVX512F__)
  const int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, rounding));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kWidth; ++i) from_float(v[i], p + i);
#endif
}

// Stores past the caches, for outputs that are too large to stay there; a plain store reads its line first. The address
// is a multiple of the stored size, and a fence must follow before another thread reads. Other processors than x86-64
// use plain stores.
VAR_INLINE void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#else
  store(p, v);
#endif
}
template <class T>
VAR_INLINE void stream(T* p, Vec v) {
  T lanes[kWidth];
  store(lanes, v);
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, _mm256_loadu_si256((const __m256i*)lanes));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, _mm_loadu_si128((const __m128i*)lanes));
#else
  memcpy(p, lanes, sizeof lanes);
#endif
}
VAR_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- tails: the first n of kWidth lanes; the other lanes are zero when read, and not written --------------------

template <class T>
VAR_INLINE Vec load_tail(const T* p, int64_t n) {
  T lanes[kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
VAR_INLINE void store_tail(T* p, Vec v, int64_t n) {
  T lanes[kWidth];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
#if defined(__AVX512F__)
VAR_INLINE Vec load_tail(const float* p, int64_t n) { return (Vec)_mm512_maskz_loadu_ps((1u << n) - 1u, p); }
VAR_INLINE void store_tail(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, (1u << n) - 1u, (__m512)v); }
template <class T>
VAR_INLINE Vec load_tail_16bit(const T* p, int64_t n) {
  const __m256i lanes = _mm256_maskz_loadu_epi16((1u << n) - 1u, p);
  return load((const T*)&lanes);
}
template <class T>
VAR_INLINE void store_tail_16bit(T* p, Vec v, int64_t n) {
  __m256i lanes;
  store((T*)&lanes, v);
  _mm256_mask_storeu_epi16(p, (1u << n) - 1u, lanes);
}
VAR_INLINE Vec load_tail(const bf16* p, int64_t n) { return load_tail_16bit(p, n); }
VAR_INLINE Vec load_tail(const fp16* p, int64_t n) { return load_tail_16bit(p, n); }
VAR_INLINE void store_tail(bf16* p, Vec v, int64_t n) { store_tail_16bit(p, v, n); }
VAR_INLINE void store_tail(fp16* p, Vec v, int64_t n) { store_tail_16bit(p, v, n); }
#endif

// ---- transposition of kWidth by kWidth, in registers -----------------------------------------------------------

// In the new a, lanes whose index has bit `Step` clear come from a, and the others from b, moved up by Step. The new b
// is the mirror image.
template <int Step, int... Lane>
VAR_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  const Vec low = __builtin_shufflevector(a, b, (Lane & Step ? kWidth + Lane - Step : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Step ? kWidth + Lane : Lane + Step)...);
#else
  const Vec low = __builtin_shuffle(a, b, IVec{(Lane & Step ? kWidth + Lane - Step : Lane)...});
  b = __builtin_shuffle(a, b, IVec{(Lane & Step ? kWidth + Lane : Lane + Step)...});
#endif
  a = low;
}
template <int Step>
VAR_INLINE void transpose_step(Vec (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; ++i)
    if (!(i & Step)) exchange<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, kWidth>());
  if constexpr (Step > 1) transpose_step<Step / 2>(rows);
}

// ---- reductions in a fixed order: results do not depend on the caller ------------------------------------------

// Folds halves until four lanes are left. The steps are written out, because GCC turns a loop over the halves into a
// loop through memory, which takes some sixty cycles instead of ten.
using Quad = float __attribute__((vector_size(16)));
template <class F>
VAR_INLINE Quad fold_to_quad(Vec v, F f) {
#if defined(__AVX512F__)
  const __m256 half = f(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return (Quad)f(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  return (Quad)f(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
#else
  (void)f;
  return (Quad)v;
#endif
}
VAR_INLINE float reduce_add(Vec v) {
  const Quad q = fold_to_quad(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  return (q[0] + q[2]) + (q[1] + q[3]);
}
VAR_INLINE float reduce_max(Vec v) {
  const Quad q = fold_to_quad(v, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
  const float even = q[0] > q[2] ? q[0] : q[2], odd = q[1] > q[3] ? q[1] : q[3];
  return even > odd ? even : odd;
}

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// 2^x for x < 128, as 2^floor(x) · p(x - floor(x)) with a minimax polynomial p with p(0) = 1. The relative error is
// 1.5e-7 at degree 5, and 9e-5 at degree 3, which is for results that are rounded to 16 bits. Results below 2^-126
// become 0, because x86 takes fifty times as long for a subnormal number. NaN stays NaN.
template <int Degree = 5>
VAR_INLINE Vec exp2_v(Vec x) {
  static_assert(Degree == 3 || Degree == 5);
#if defined(__AVX512DQ__)
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
  const Vec rounder = splat(12582912.0f);  // 1.5·2^23; adding it rounds to an integer in the low bits of the mantissa
  const Vec shifted = x - 0.5f + rounder;
  const Vec f = x - (shifted - rounder);  // may be 1 for an integer x, where p is as accurate
#endif
  Vec p;
  if constexpr (Degree == 3) {
    p = f * 7.7067040e-2f + 2.2764499e-1f;
    p = p * f + 6.9511676e-1f;
  } else {
    p = f * 1.8671300e-3f + 9.0170307e-3f;
    p = p * f + 5.5799913e-2f;
    p = p * f + 2.4016444e-1f;
    p = p * f + 6.9315130e-1f;
  }
  p = p * f + 1.0f;
#if defined(__AVX512DQ__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)x);
#else
  const Vec y = p * as_float((as_bits(shifted) + 127u - 0x4b400000u) << 23);
  return x < -126.0f ? Vec{} : y;
#endif
}

// log x for normal x > 0. With x = 2^e · m and m in [1/√2, √2) it is e·log 2 + 2·artanh((m - 1)/(m + 1)). The error is
// below 3e-7 of the larger of 1 and the result. 0 gives -inf, and NaN stays NaN.
VAR_INLINE Vec log_v(Vec x) {
  const UVec bits = as_bits(x) - 0x3f3504f3u;  // subtracts the bits of 1/√2, so that e is one higher where m reaches √2
  const Vec e = __builtin_convertvector((IVec)bits >> 23, Vec);
  const Vec m = as_float((bits & 0x007fffffu) + 0x3f3504f3u);
  const Vec s = (m - 1.0f) / (m + 1.0f), square = s * s;
  Vec p = square * (2.0f / 9) + 2.0f / 7;
  p = p * square + 2.0f / 5;
  p = p * square + 2.0f / 3;
  p = p * square + 2.0f;
  const Vec y = e * kLn2 + s * p;
  return x > 0.0f ? y : x == 0.0f ? splat(-kInfinity) : x;
}

}  // namespace VAR_ISA
}  // namespace var_kernels
