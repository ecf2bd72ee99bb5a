// GroupNorm of channels-last images, optionally followed by SiLU. A channel is a lane, so sums over pixels need no
// reduction across lanes.
//
// Memory is the limit: x is read twice, y written once. Moments are taken from 64 pixels at a time, the mean first,
// then the squared differences from it, which are read from the caches. One sweep with E[x²] - E[x]² would lose half of
// the digits.
#include "group_norm_silu.h"

#include "isa.h"

namespace var_kernels::VAR_ISA {
namespace {

// Calls f(c, read, write) for every vector of channels, whole vectors first. read(p) and write(p, v) load and store as
// many lanes as the vector has.
template <class F>
VAR_INLINE void for_each_vector(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth)
    f(c, [](const auto* p) VAR_LAMBDA { return load(p); }, [](auto* p, Vec v) VAR_LAMBDA { store(p, v); });
  if (const int64_t rest = channels - c; rest > 0)
    f(c, [rest](const auto* p) VAR_LAMBDA { return load_tail(p, rest); },
      [rest](auto* p, Vec v) VAR_LAMBDA { store_tail(p, v, rest); });
}

template <class T>
void moments(const void* data, int64_t pixels, int64_t channels, float* mean, float* squares) {
  for_each_vector(channels, [&](int64_t c, auto read, auto write) VAR_LAMBDA {
    const T* x = (const T*)data + c;
    Vec sums[2] = {};
    int64_t i = 0;
    for (; i + 2 <= pixels; i += 2) {
      sums[0] += read(x + i * channels);
      sums[1] += read(x + (i + 1) * channels);
    }
    if (i < pixels) sums[0] += read(x + i * channels);
    const Vec centre = (sums[0] + sums[1]) / float(pixels);
    Vec left[2] = {};
    for (i = 0; i + 2 <= pixels; i += 2) {
      const Vec a = read(x + i * channels) - centre, b = read(x + (i + 1) * channels) - centre;
      left[0] = a * a + left[0];
      left[1] = b * b + left[1];
    }
    if (i < pixels) {
      const Vec a = read(x + i * channels) - centre;
      left[0] = a * a + left[0];
    }
    write(mean + c, centre);
    write(squares + c, left[0] + left[1]);
  });
}

template <bool kSilu>
VAR_INLINE Vec activated(Vec y) {
  if constexpr (kSilu) return y / (exp2_v(y * -kLog2E) + 1.0f);
  return y;
}

template <class T, bool kSilu, bool kStream>
void apply_rows(const T* x, int64_t pixels, int64_t channels, const float* factor, const float* addend, T* y) {
  for (int64_t i = 0; i < pixels; ++i)
    for_each_vector(channels, [&](int64_t c, auto read, auto write) VAR_LAMBDA {
      const Vec v = activated<kSilu>(read(x + i * channels + c) * read(factor + c) + read(addend + c));
      if constexpr (kStream)
        stream(y + i * channels + c, v);
      else
        write(y + i * channels + c, v);
    });
  if constexpr (kStream) stream_fence();
}

template <class T>
void apply(const void* x, int64_t pixels, int64_t channels, const float* factor, const float* addend, bool silu,
           bool stream, void* y) {
  const auto rows = silu ? stream ? apply_rows<T, true, true> : apply_rows<T, true, false>
                         : stream ? apply_rows<T, false, true> : apply_rows<T, false, false>;
  rows((const T*)x, pixels, channels, factor, addend, (T*)y);
}

}  // namespace

extern const GroupNormTable group_norm_table;
const GroupNormTable group_norm_table = {{moments<float>, moments<bf16>, moments<fp16>},
                                         {apply<float>, apply<bf16>, apply<fp16>}};

}  // namespace var_kernels::VAR_ISA
