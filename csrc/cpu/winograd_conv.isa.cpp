// 3×3 convolution of channels-last images by Winograd's minimal filtering. A tile of 2×2 outputs takes 4×4 products of
// channels instead of 36, 4×4 outputs take 6×6 instead of 144, and 2×2 outputs of an image doubled by nearest neighbour
// take 3×3 instead of 36.
//
// Arithmetic is the limit. The inputs of a block of tiles are transformed, which takes additions and, in F(4×4),
// products with constants. Then there is one product of matrices (tiles, C_in) · (C_in, C_out) for each point, and the
// results are transformed back. The block is small enough to stay in the second-level cache throughout. The packed
// weights come from further away, but each of their lines serves the whole block.
#include "winograd_conv.h"

#include "gemm.h"
#include "tiles.h"

namespace var_kernels::VAR_ISA {
namespace {

// The transforms in one direction: inputs to points, points to outputs. (winograd_conv.py transforms filters, in fp64.)
struct TwoOutputs {
  static constexpr WinogradScheme kScheme = kWinogradSchemes[0];
  static VAR_INLINE void input(const Vec (&d)[4], Vec (&m)[4]) {
    m[0] = d[0] - d[2];
    m[1] = d[1] + d[2];
    m[2] = d[2] - d[1];
    m[3] = d[1] - d[3];
  }
  static VAR_INLINE void output(const Vec (&m)[4], Vec (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
};

// The points are 0, ±a, ±b and infinity. a = 5/8 and b = 3/2 have half the error of the usual 1 and 2. They are the
// best of all pairs of dyadic fractions tried; the products of dyadic fractions here are exact.
struct FourOutputs {
  static constexpr WinogradScheme kScheme = kWinogradSchemes[1];
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;
  static VAR_INLINE void input(const Vec (&d)[6], Vec (&m)[6]) {
    const Vec even_a = d[4] - d[2] * b2, odd_a = (d[3] - d[1] * b2) * a;
    const Vec even_b = d[4] - d[2] * a2, odd_b = (d[3] - d[1] * a2) * b;
    m[0] = d[0] * (a2 * b2) - d[2] * (a2 + b2) + d[4];
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = d[1] * (a2 * b2) - d[3] * (a2 + b2) + d[5];
  }
  static VAR_INLINE void output(const Vec (&m)[6], Vec (&y)[4]) {
    const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = odd_a * a + odd_b * b;
    y[2] = even_a * a2 + even_b * b2;
    y[3] = odd_a * (a2 * a) + odd_b * (b2 * b) + m[5];
  }
};

// In a doubled image the middle two of four inputs are equal, so the third of four points is zero and left out.
struct DoubledOutputs {
  static constexpr WinogradScheme kScheme = kWinogradSchemes[2];
  static VAR_INLINE void input(const Vec (&d)[3], Vec (&m)[3]) {
    m[0] = d[0] - d[1];
    m[1] = d[1];
    m[2] = d[1] - d[2];
  }
  static VAR_INLINE void output(const Vec (&m)[3], Vec (&y)[2]) {
    y[0] = m[0] + m[1];
    y[1] = m[1] - m[2];
  }
};

// Transforms a tile of inputs to its points. x is the top left input; rows are `row` elements apart, and points `point`
// elements.
template <class F, class T, class S>
VAR_INLINE void transform_input(const T* x, int64_t row, int64_t channels, S* v, int64_t point) {
  constexpr int inputs = F::kScheme.inputs, points = F::kScheme.points;
  const auto vector = [&](int64_t c, auto read) VAR_LAMBDA {
    Vec w[points][inputs];  // transformed along the columns
    for (int j = 0; j < inputs; ++j) {
      Vec d[inputs], m[points];
      for (int i = 0; i < inputs; ++i) d[i] = read(x + i * row + j * channels + c);
      F::input(d, m);
      for (int p = 0; p < points; ++p) w[p][j] = m[p];
    }
    for (int p = 0; p < points; ++p) {
      Vec m[points];
      F::input(w[p], m);
      for (int q = 0; q < points; ++q) store(v + (p * points + q) * point + c, m[q]);
    }
  };
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) vector(c, [](const T* p) VAR_LAMBDA { return load(p); });
  const int64_t rest = channels - c;
  if (rest > 0) vector(c, [rest](const T* p) VAR_LAMBDA { return load_tail(p, rest); });
  for (c += rest > 0 ? kWidth : 0; c < round_up(channels, kWinogradDepth); c += kWidth)
    for (int p = 0; p < points * points; ++p) store(v + p * point + c, Vec{});
}

// Transforms the points of a tile, which are `point` floats apart, to rows × columns outputs at y, whose rows are `row`
// elements apart and whose columns are `column` elements apart.
template <class F, class T>
VAR_INLINE void transform_output(const float* m, int64_t point, const float* bias, int64_t channels, int64_t rows,
                                 int64_t columns, const T* residual, T* y, int64_t row, int64_t column, bool streamed) {
  constexpr int outputs = F::kScheme.outputs, points = F::kScheme.points;
  const auto vector = [&](int64_t c, auto read, auto write) VAR_LAMBDA {
    Vec w[outputs][points];
    for (int q = 0; q < points; ++q) {
      Vec line[points], y[outputs];
      for (int p = 0; p < points; ++p) line[p] = load(m + (p * points + q) * point + c);
      F::output(line, y);
      for (int i = 0; i < outputs; ++i) w[i][q] = y[i];
    }
    const Vec start = read(bias + c);
    for (int i = 0; i < outputs; ++i) {
      if (i >= rows) break;
      Vec sums[outputs];
      F::output(w[i], sums);
      for (int j = 0; j < outputs; ++j) {
        if (j >= columns) break;
        const int64_t at = i * row + j * column + c;
        write(y + at, residual ? sums[j] + start + read(residual + at) : sums[j] + start);
      }
    }
  };
  int64_t c = 0;
  if (streamed)
    for (; c + kWidth <= channels; c += kWidth)
      vector(c, [](const auto* p) VAR_LAMBDA { return load(p); }, [](T* p, Vec v) VAR_LAMBDA { stream(p, v); });
  for (; c + kWidth <= channels; c += kWidth)
    vector(c, [](const auto* p) VAR_LAMBDA { return load(p); }, [](T* p, Vec v) VAR_LAMBDA { store(p, v); });
  if (const int64_t rest = channels - c; rest > 0)
    vector(c, [rest](const auto* p) VAR_LAMBDA { return load_tail(p, rest); },
           [rest](T* p, Vec v) VAR_LAMBDA { store_tail(p, v, rest); });
}

template <class F, class T, class S>
void tiles(const WinogradConv& a, int64_t image, int64_t first, int64_t count, int64_t column, int64_t end,
           float* scratch) {
  using Element = typename Stored<S>::Element;
  constexpr WinogradScheme scheme = F::kScheme;
  constexpr int64_t kPoints = scheme.points * scheme.points;
  const TileUnit unit_is_ready;
  const int64_t depth = round_up(a.in_channels, kWinogradDepth), scalars = depth / kPerScalar<S>;
  const int64_t across = scheme.tiles(a.width);
  const int64_t rows = round_up(count, kWinogradColumns);
  const int64_t v_point = rows * depth + kWinogradGap, m_point = rows * kWinogradStrip + kWinogradGap;
  float *products = scratch, *transformed = products + kPoints * m_point;
  T* patch = (T*)(transformed + kPoints * v_point);
  Element* v = (Element*)transformed;

  const int64_t in_row = a.width * a.in_channels;
  const T* x = (const T*)a.x + image * a.height * in_row;
  constexpr int step = scheme.outputs / scheme.scale;  // inputs from one tile to the next
  for (int64_t t = 0; t < count; ++t) {
    const int64_t top = (first + t) / across * step - 1, left = (first + t) % across * step - 1;
    Element* to = v + t * depth;
    if (top >= 0 && left >= 0 && top + scheme.inputs <= a.height && left + scheme.inputs <= a.width) {
      transform_input<F>(x + top * in_row + left * a.in_channels, in_row, a.in_channels, to, v_point);
      continue;
    }
    const int64_t cell = a.in_channels * sizeof(T);
    for (int i = 0; i < scheme.inputs; ++i)
      for (int j = 0; j < scheme.inputs; ++j) {
        const int64_t r = top + i, s = left + j;
        T* at = patch + (i * scheme.inputs + j) * a.in_channels;
        if (r < 0 || r >= a.height || s < 0 || s >= a.width)
          memset(at, 0, cell);
        else
          memcpy(at, x + r * in_row + s * a.in_channels, cell);
      }
    transform_input<F>(patch, scheme.inputs * a.in_channels, a.in_channels, to, v_point);
  }

  const int64_t out_height = a.height * scheme.scale, out_width = a.width * scheme.scale;
  const int64_t out_row = out_width * a.out_channels;
  const S *weights = (const S*)a.weight, *weight = weights + kPoints * scalars * column;
  const S* const weights_end = weights + kPoints * scalars * round_up(a.out_channels, kWinogradColumns);
  for (int64_t n = column; n < end; n += kWinogradStrip) {
    const int64_t strip = min_i(kWinogradStrip, end - n);
    for (int64_t p = 0; p < kPoints; ++p) {
      const S* next = weight + scalars * strip;
      gemm(rows, strip, scalars, (const S*)(v + p * v_point), scalars, int64_t{1}, weight, strip,
           products + p * m_point, strip, false, LinesAhead(next, weights_end, scalars, strip));
      weight = next;
    }
    for (int64_t t = 0; t < count; ++t) {
      const int64_t r = (first + t) / across * scheme.outputs, s = (first + t) % across * scheme.outputs;
      const int64_t at = ((image * out_height + r) * out_width + s) * a.out_channels + n;
      transform_output<F>(products + t * strip, m_point, a.bias + n, min_i(strip, a.out_channels - n),
                          out_height - r, out_width - s, a.residual ? (const T*)a.residual + at : nullptr,
                          (T*)a.y + at, out_row, a.out_channels, a.stream);
    }
  }
  if (a.stream) stream_fence();
}

constexpr int kLanes = kWinogradColumns;

// The filters of kLanes output channels and kWinogradDepth input channels; those that do not exist are zero. They are
// copied row by row, because filters that are read one by one from rows far apart wait for memory each time.
struct FilterBlock {
  float rows[kLanes][kWinogradDepth * 9];

  FilterBlock(const WinogradFilters& f, int64_t column, int64_t channel) {
    const int64_t count = max_i(0, min_i(f.in_channels - channel, kWinogradDepth)) * 9;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t taps = column + lane < f.out_channels ? count : 0;
      memcpy(rows[lane], f.weight + ((column + lane) * f.in_channels + channel) * 9, taps * sizeof(float));
      memset(rows[lane] + taps, 0, sizeof rows[lane] - taps * sizeof(float));
    }
  }
};

// The filters from one input channel of the block, transformed in fp64 and rounded once, point after point.
template <int Points>
VAR_INLINE void transform_filters(const FilterBlock& block, int64_t channel, const double* g,
                                  float (&points)[Points * Points][kLanes]) {
  float taps[9][kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int t = 0; t < 9; ++t) taps[t][lane] = block.rows[lane][channel * 9 + t];
  double rows[Points][3][kLanes];
  for (int p = 0; p < Points; ++p)
    for (int j = 0; j < 3; ++j)
      for (int lane = 0; lane < kLanes; ++lane)
        rows[p][j][lane] = g[3 * p] * taps[j][lane] + g[3 * p + 1] * taps[3 + j][lane] + g[3 * p + 2] * taps[6 + j][lane];
  for (int p = 0; p < Points; ++p)
    for (int q = 0; q < Points; ++q)
      for (int lane = 0; lane < kLanes; ++lane)
        points[p * Points + q][lane] =
            float(g[3 * q] * rows[p][0][lane] + g[3 * q + 1] * rows[p][1][lane] + g[3 * q + 2] * rows[p][2][lane]);
}

template <class S, int Points>
void pack_points(const WinogradFilters& f, int64_t column, int64_t first) {
  const int64_t strip = min_i(kWinogradStrip, f.columns - column), scalars = f.depth / kPerScalar<S>;
  float* const to = (float*)f.packed + Points * Points * scalars * column;
  for (int64_t n = 0; n < strip; n += kLanes) {
    const FilterBlock block(f, column + n, first);
    for (int64_t c = 0; c < kWinogradDepth; c += kPerScalar<S>) {
      float filters[kPerScalar<S>][Points * Points][kLanes];
      for (int i = 0; i < kPerScalar<S>; ++i) transform_filters<Points>(block, c + i, f.transform, filters[i]);
      for (int p = 0; p < Points * Points; ++p)
        for (int lane = 0; lane < kLanes; lane += kWidth) {
          Vec v = load(filters[0][p] + lane);
#if defined(__AVX512BF16__)
          if constexpr (kPerScalar<S> == 2) v = interleave(v, load(filters[1][p] + lane));
#endif
          stream(to + (p * scalars + (first + c) / kPerScalar<S>) * strip + n + lane, v);
        }
    }
  }
  stream_fence();
}

template <class S>
void pack(const WinogradFilters& f, int64_t column, int64_t first) {
  return f.points == 3   ? pack_points<S, 3>(f, column, first)
         : f.points == 4 ? pack_points<S, 4>(f, column, first)
                         : pack_points<S, 6>(f, column, first);
}

#if defined(__AVX512BF16__)
#define VAR_PAIRS(F) tiles<F, bf16, Pair>
#define VAR_PACK_PAIRS pack<Pair>
#else
#define VAR_PAIRS(F) nullptr
#define VAR_PACK_PAIRS nullptr
#endif
#define VAR_TYPES(F) {tiles<F, float, float>, VAR_PAIRS(F), tiles<F, bf16, float>}

}  // namespace

extern const WinogradConvTable winograd_conv_table;
const WinogradConvTable winograd_conv_table = {
    {VAR_TYPES(TwoOutputs), VAR_TYPES(FourOutputs), VAR_TYPES(DoubledOutputs)}, {pack<float>, VAR_PACK_PAIRS}};

}  // namespace var_kernels::VAR_ISA
