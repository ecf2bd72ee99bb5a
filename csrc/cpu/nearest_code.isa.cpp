// Nearest code as a matrix product that never leaves the registers.
//
// score(row, code) = z·c - |c|²/2 is minus half of |z - c|² without the |z|² that all codes share; the largest score
// wins. Codes and vectors are counted from the centre of the codebook. A strip of the codebook is packed as its
// -|c|²/2, then its channels, with codes side by side in the lanes:
//   packed = [ -|c|²/2 : strip ][ channel 0 : strip ] … [ channel C-1 : strip ]
// The accumulators start with the first line, and every further step is one fused multiply-add per element. For cosine
// the codes are normalised while packing, and the first line is zero. Lanes beyond the last code start at -inf.
//
// For each row only the best score of each lane and the strip it came from are kept: 1 compare, 1 blend and NV maxima
// beside the NV·C multiply-adds of a strip (NV vectors of codes). The place inside the strip is found at the end, by
// computing the scores of the row with the winning strip again. Every code takes the same operations in the same order
// wherever it lies, so equal codes have equal scores. The first strip that reaches the maximum wins, and in it the
// first lane.
#include "nearest_code.h"

#include "isa.h"

namespace var_kernels::VAR_ISA {
namespace {

// Six rows by four vectors of codes, with the operands of a step, fill 32 registers; six rows by two vectors fill 16.
constexpr int kRows = 6;
constexpr int kVectors = kWidth == 16 ? 4 : 2;
constexpr int64_t kStrip = kVectors * kWidth;

// The best score of each lane so far, and the strip in which it was found; the strip has no meaning while the score is
// -inf.
struct Best {
  Vec score;
  IVec strip;
};

// Packs one vector of codes: kWidth columns of the strip, transposed a block at a time.
VAR_INLINE void pack_lanes(const float* codes, int64_t count, int64_t channels, float* panel) {
  for (int64_t c = 0; c < channels; c += kWidth) {
    const int64_t width = min_i(channels - c, kWidth);
    Vec rows[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      const float* at = codes + i * channels + c;
      rows[i] = i >= count ? Vec{} : width == kWidth ? load(at) : load_tail(at, width);
    }
    transpose_step<kWidth / 2>(rows);
    for (int64_t i = 0; i < width; ++i) store(panel + (c + i) * kStrip, rows[i]);
  }
}

bool find_centre(const float* codebook, int64_t codes, int64_t channels, float* centre) {
  bool moved = false;
  for (int64_t c = 0; c < channels; c += kWidth) {
    const int64_t width = min_i(channels - c, kWidth);
    Vec low = splat(kInfinity), high = splat(-kInfinity);
    for (int64_t i = 0; i < kCentreCodes; ++i) {
      const float* at = codebook + i * codes / kCentreCodes * channels + c;
      const Vec v = width == kWidth ? load(at) : load_tail(at, width);
      const IVec finite = (v < kInfinity) & (v > -kInfinity);  // not for NaN
      low = finite & (v < low) ? v : low;
      high = finite & (v > high) ? v : high;
    }
    const Vec middle = 0.5f * low + 0.5f * high, distance = max_v(middle, -middle);
    const Vec point = distance > high - low ? middle : Vec{};  // 0 if no element is finite, because `high - low` is -inf
    store_tail(centre + c, point, width);
    for (int64_t i = 0; i < width; ++i) moved |= point[i] != 0.0f;
  }
  return moved;
}

void subtract(const float* centre, int64_t rows, int64_t channels, float* x) {
  for (int64_t i = 0; i < rows; ++i, x += channels)
    for (int64_t c = 0; c < channels; ++c) x[c] -= centre[c];
}

void pack(const float* codebook, int64_t codes, int64_t channels, const float* centre, bool cosine, int64_t index,
          float* packed) {
  for (int64_t j = 0; j < kStrip; j += kWidth) {
    const int64_t first = index * kStrip + j, count = max_i(0, min_i(codes - first, kWidth));
    float* panel = packed + kStrip + j;
    pack_lanes(codebook + first * channels, count, channels, panel);
    if (centre != nullptr)
      for (int64_t c = 0; c < channels; ++c) store(panel + c * kStrip, load(panel + c * kStrip) - centre[c]);
    Vec squares = {};
    for (int64_t c = 0; c < channels; ++c) {
      const Vec v = load(panel + c * kStrip);
      squares += v * v;
    }
    if (cosine) {
      for (int i = 0; i < kWidth; ++i) squares[i] = __builtin_sqrtf(squares[i]);
      const Vec norm = squares < 1e-12f ? splat(1e-12f) : squares;  // a NaN stays
      for (int64_t c = 0; c < channels; ++c) store(panel + c * kStrip, load(panel + c * kStrip) / norm);
      squares = Vec{};
    }
    Vec start = squares * -0.5f;
    for (int64_t i = count; i < kWidth; ++i) start[i] = -kInfinity;
    store(packed + j, start);
  }
}

template <int MR>
VAR_INLINE void scores(const float* VAR_RESTRICT z, int64_t channels, const float* VAR_RESTRICT strip,
                       Vec (&acc)[MR][kVectors]) {
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < kVectors; ++j) acc[i][j] = load(strip + j * kWidth);
  for (int64_t c = 0; c < channels; ++c) {
    Vec codes[kVectors];
    for (int j = 0; j < kVectors; ++j) codes[j] = load(strip + (c + 1) * kStrip + j * kWidth);
    for (int i = 0; i < MR; ++i) {
      const Vec value = splat(z[i * channels + c]);
      for (int j = 0; j < kVectors; ++j) acc[i][j] += value * codes[j];
    }
  }
}

template <int MR>
VAR_INLINE void update(const float* z, int64_t channels, const float* strip, int64_t index, Best* best) {
  Vec acc[MR][kVectors];
  scores<MR>(z, channels, strip, acc);
  for (int i = 0; i < MR; ++i) {
    Vec top = best[i].score;
    for (int j = 0; j < kVectors; ++j) top = max_v(acc[i][j], top);  // max_v keeps its second operand beside a NaN
    best[i].strip = top > best[i].score ? IVec{} + int32_t(index) : best[i].strip;
    best[i].score = top;
  }
}

VAR_INLINE int32_t lowest(IVec v) {
  int32_t lanes[kWidth], low = INT32_MAX;
  memcpy(lanes, &v, sizeof v);
  for (int i = 0; i < kWidth; ++i) low = lanes[i] < low ? lanes[i] : low;
  return low;
}

// The lowest index with the highest score. It looks for the lowest strip first, because all indices of a strip precede
// those of the next.
VAR_INLINE int64_t resolve(const float* z, int64_t channels, const float* packed, const Best& best) {
  const float top = reduce_max(best.score);
  if (!(top > -kInfinity)) return 0;
  const int64_t index = lowest(best.score == top ? best.strip : IVec{} + INT32_MAX);
  Vec acc[1][kVectors], strip_top = splat(-kInfinity);
  scores<1>(z, channels, packed + index * (channels + 1) * kStrip, acc);
  for (int j = 0; j < kVectors; ++j) strip_top = max_v(acc[0][j], strip_top);
  const float score = reduce_max(strip_top);
  IVec lane, place = IVec{} + INT32_MAX;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  for (int j = kVectors - 1; j >= 0; --j) place = acc[0][j] == score ? lane + j * kWidth : place;
  return index * kStrip + lowest(place);
}

void search(const float* z, int64_t rows, int64_t channels, const float* packed, int64_t strips, int64_t* out) {
  Best best[kNearestCodeRows];
  for (int64_t i = 0; i < rows; ++i) best[i] = {splat(-kInfinity), IVec{}};
  for (int64_t s = 0; s < strips; ++s) {
    const float* strip = packed + s * (channels + 1) * kStrip;
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) update<kRows>(z + i * channels, channels, strip, s, best + i);
    const float* rest = z + i * channels;
    switch (rows - i) {
      case 5: update<5>(rest, channels, strip, s, best + i); break;
      case 4: update<4>(rest, channels, strip, s, best + i); break;
      case 3: update<3>(rest, channels, strip, s, best + i); break;
      case 2: update<2>(rest, channels, strip, s, best + i); break;
      case 1: update<1>(rest, channels, strip, s, best + i); break;
      default: break;
    }
  }
  for (int64_t i = 0; i < rows; ++i) out[i] = resolve(z + i * channels, channels, packed, best[i]);
}

}  // namespace

extern const NearestCodeTable nearest_code_table;
const NearestCodeTable nearest_code_table = {kStrip, find_centre, subtract, pack, search};

}  // namespace var_kernels::VAR_ISA
