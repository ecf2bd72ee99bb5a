// Modulated LayerNorm, y = (x - mean)·rstd·(1 + scale) + shift, with the gated residual sum in front of it if wanted.
//
// The limit is memory: C elements of x come in and C of y go out, and there is nothing to reuse. A row (4 KB at
// C = 1024 in fp32) stays in L1 between the passes below, so only the first one reads memory. That makes the plain
// two-pass variance (mean first, then the squares of the centred values) free; it is as accurate as Welford's update
// without its division and its chain of dependent operations, and safe where E[x²] - E[x]² cancels.
//
// Backward, with h = (x - mean)·rstd, g = dy·(1 + scale) and means over the row:
//   dx = rstd·(g - mean(g) - h·mean(g·h)) [+ dresidual],   dscale = Σ dy·h,   dshift = Σ dy,
// and in the gated form dbranch = dx·gate, dgate = Σ dx·branch. One pass forms the two means, the second the outputs.
#include "adaln_layer_norm.h"

#include "isa.h"

namespace var_kernels::VAR_ISA {
namespace {

// Lambdas below run once per vector: a call would cost more than their body.
#define VAR_LAMBDA __attribute__((always_inline))

// ---- one row, vector by vector ----------------------------------------------------------------------------------

struct Whole {};
struct Part {
  int64_t lanes;  // the first 1 … kWidth - 1 lanes exist
};

template <class T>
VAR_INLINE Vec get(const T* p, Whole) {
  return load(p);
}
template <class T>
VAR_INLINE Vec get(const T* p, Part part) {
  return load_tail(p, part.lanes);
}
template <class T>
VAR_INLINE void put(T* p, Vec v, Whole) {
  store(p, v);
}
template <class T>
VAR_INLINE void put(T* p, Vec v, Part part) {
  store_tail(p, v, part.lanes);
}
VAR_INLINE Vec existing(Vec v, Whole) { return v; }
VAR_INLINE Vec existing(Vec v, Part part) {
  for (int i = 0; i < kWidth; ++i) v[i] = i < part.lanes ? v[i] : 0.0f;
  return v;
}

template <class F>
VAR_INLINE void for_each_vector(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) f(c, Whole{});
  if (c < channels) f(c, Part{channels - c});
}

// f(c, part, sums) adds its vectors to S running sums. Four sets of sums hide the latency of the addition.
template <int S, class F>
VAR_INLINE void sum_row(int64_t channels, float (&total)[S], F f) {
  constexpr int kSets = 4;
  Vec sums[kSets][S] = {};
  int64_t c = 0;
  for (; c + kSets * kWidth <= channels; c += kSets * kWidth)
    for (int i = 0; i < kSets; ++i) f(c + i * kWidth, Whole{}, sums[i]);
  for (; c + kWidth <= channels; c += kWidth) f(c, Whole{}, sums[0]);
  if (c < channels) f(c, Part{channels - c}, sums[0]);
  for (int s = 0; s < S; ++s) total[s] = reduce_add((sums[0][s] + sums[1][s]) + (sums[2][s] + sums[3][s]));
}

template <class T>
VAR_INLINE const T* row_of(const Rows& rows, int64_t sample, int64_t token) {
  return static_cast<const T*>(rows.data) + sample * rows.per_sample + token * rows.per_token;
}

// ---- forward ----------------------------------------------------------------------------------------------------

template <class T, bool kGated>
VAR_INLINE void forward_row(const AdaLNForward& a, int64_t row) {
  const int64_t sample = row / a.length, token = row % a.length, channels = a.channels;
  const T* x = row_of<T>(a.x, sample, token);
  const T* scale = row_of<T>(a.scale, sample, token);
  const T* shift = row_of<T>(a.shift, sample, token);
  T* y = static_cast<T*>(a.y) + row * channels;
  float sum[1];
  if constexpr (kGated) {
    const T* in = x;
    const T* branch = row_of<T>(a.branch, sample, token);
    const T* gate = row_of<T>(a.gate, sample, token);
    T* residual = static_cast<T*>(a.residual) + row * channels;
    sum_row(channels, sum, [=](int64_t c, auto part, Vec(&sums)[1]) VAR_LAMBDA {
      put(residual + c, get(in + c, part) + get(gate + c, part) * get(branch + c, part), part);
      sums[0] += get(residual + c, part);  // the rounded value is what the norm sees
    });
    x = residual;
  } else {
    sum_row(channels, sum, [=](int64_t c, auto part, Vec(&sums)[1]) VAR_LAMBDA { sums[0] += get(x + c, part); });
  }
  const float mean = sum[0] / float(channels);
  sum_row(channels, sum, [=](int64_t c, auto part, Vec(&sums)[1]) VAR_LAMBDA {
    const Vec centred = existing(get(x + c, part) - mean, part);
    sums[0] += centred * centred;
  });
  const float rstd = 1.0f / __builtin_sqrtf(sum[0] / float(channels) + a.eps);
  for_each_vector(channels, [=](int64_t c, auto part) VAR_LAMBDA {
    const Vec normalised = (get(x + c, part) - mean) * rstd;
    put(y + c, normalised * (get(scale + c, part) + 1.0f) + get(shift + c, part), part);
  });
  a.mean[row] = mean;
  a.rstd[row] = rstd;
}

template <class T>
void forward(const AdaLNForward& a, int64_t begin, int64_t end) {
  if (a.branch.data != nullptr)
    for (int64_t row = begin; row < end; ++row) forward_row<T, true>(a, row);
  else
    for (int64_t row = begin; row < end; ++row) forward_row<T, false>(a, row);
}

// ---- backward ---------------------------------------------------------------------------------------------------

template <class T>
struct GradRow {
  T* out;      // this token's own row, or null
  float* sum;  // the chunk's partial sums, or null

  template <class P>
  VAR_INLINE void add(int64_t c, Vec value, P part) const {
    if (out != nullptr)
      put(out + c, value, part);
    else
      put(sum + c, get(sum + c, part) + value, part);
  }
};

template <class T>
VAR_INLINE GradRow<T> grad_row(const ModulationGrad& grad, int64_t row, int64_t chunk, int64_t channels) {
  return {grad.per_token ? static_cast<T*>(grad.per_token) + row * channels : nullptr,
          grad.partial ? grad.partial + chunk * channels : nullptr};
}

template <class T, bool kGated>
VAR_INLINE void backward_row(const AdaLNBackward& a, int64_t sample, int64_t token, int64_t chunk) {
  const int64_t channels = a.channels, row = sample * a.length + token;
  const T* dy = row_of<T>(a.dy, sample, token);
  const T* x = row_of<T>(a.x, sample, token);
  const T* scale = row_of<T>(a.scale, sample, token);
  const GradRow<T> dscale = grad_row<T>(a.dscale, row, chunk, channels);
  const GradRow<T> dshift = grad_row<T>(a.dshift, row, chunk, channels);
  const float mean = a.mean[row], rstd = a.rstd[row];
  float sum[2];
  sum_row(channels, sum, [=](int64_t c, auto part, Vec(&sums)[2]) VAR_LAMBDA {
    const Vec d = get(dy + c, part), h = (get(x + c, part) - mean) * rstd;
    const Vec dh = d * h, s = get(scale + c, part) + 1.0f;
    dscale.add(c, dh, part);
    dshift.add(c, d, part);
    sums[0] += d * s;
    sums[1] += dh * s;
  });
  const float mean_g = sum[0] / float(channels), mean_gh = sum[1] / float(channels);
  T* dx = static_cast<T*>(a.dx) + row * channels;
  const auto dx_of = [=](int64_t c, auto part) VAR_LAMBDA {
    const Vec h = (get(x + c, part) - mean) * rstd;
    const Vec g = get(dy + c, part) * (get(scale + c, part) + 1.0f);
    return (g - mean_g - h * mean_gh) * rstd;
  };
  if constexpr (kGated) {
    const T* dresidual = row_of<T>(a.dresidual, sample, token);
    const T* branch = row_of<T>(a.branch, sample, token);
    const T* gate = row_of<T>(a.gate, sample, token);
    T* dbranch = static_cast<T*>(a.dbranch) + row * channels;
    const GradRow<T> dgate = grad_row<T>(a.dgate, row, chunk, channels);
    for_each_vector(channels, [=](int64_t c, auto part) VAR_LAMBDA {
      const Vec d = dx_of(c, part) + get(dresidual + c, part);
      put(dx + c, d, part);
      put(dbranch + c, d * get(gate + c, part), part);
      dgate.add(c, d * get(branch + c, part), part);
    });
  } else {
    for_each_vector(channels, [=](int64_t c, auto part) VAR_LAMBDA { put(dx + c, dx_of(c, part), part); });
  }
}

VAR_INLINE void clear(const ModulationGrad& grad, int64_t chunk, int64_t channels) {
  if (grad.partial != nullptr) memset(grad.partial + chunk * channels, 0, size_t(channels) * sizeof(float));
}

template <class T>
void backward(const AdaLNBackward& a, int64_t sample, int64_t begin, int64_t end, int64_t chunk) {
  clear(a.dgate, chunk, a.channels);
  clear(a.dscale, chunk, a.channels);
  clear(a.dshift, chunk, a.channels);
  if (a.dresidual.data != nullptr)
    for (int64_t token = begin; token < end; ++token) backward_row<T, true>(a, sample, token, chunk);
  else
    for (int64_t token = begin; token < end; ++token) backward_row<T, false>(a, sample, token, chunk);
}

template <class T>
void sum_partials(const float* partial, int64_t count, int64_t channels, int64_t begin, int64_t end, void* out) {
  for_each_vector(end - begin, [=](int64_t c, auto part) VAR_LAMBDA {
    Vec sum = {};
    for (int64_t i = 0; i < count; ++i) sum += get(partial + i * channels + begin + c, part);
    put(static_cast<T*>(out) + begin + c, sum, part);
  });
}

}  // namespace

extern const AdaLNTable adaln_table;
const AdaLNTable adaln_table = {
    {forward<float>, forward<bf16>, forward<fp16>},
    {backward<float>, backward<bf16>, backward<fp16>},
    {sum_partials<float>, sum_partials<bf16>, sum_partials<fp16>},
};

}  // namespace var_kernels::VAR_ISA
