// Nearest code as a matrix product that never leaves the registers.
//
// score(row, code) = z·c - |c|²/2 is the negated half of |z - c|² without the |z|² that all codes share; the largest
// wins. A strip of the codebook is packed as its -|c|²/2, then its channels, codes side by side in the lanes:
//   packed = [ -|c|²/2 : strip ][ channel 0 : strip ] … [ channel C-1 : strip ]
// so that the accumulators start at the first line and every further step is one fused multiply-add per element. With
// cosine the codes are normalised while packing and the first line is zero. Lanes beyond the last code start at -inf.
//
// Per row only the best score and the strip it came from are kept, lane by lane: 1 compare, 1 blend and NV maxima
// beside the NV·C multiply-adds of a strip. The place inside the strip is found at the end by computing the scores of
// one row with the winning strip again. Every code sees the same operations in the same order wherever it lies, so
// equal codes have equal scores, and the first strip and then the first lane that reach the maximum win.
#include "nearest_code.h"

#include "gemm.h"

namespace var_kernels::VAR_ISA {
namespace {

constexpr int64_t kStrip = kVectors * kWidth;

// The lanes' best score so far and the strip it was found in; -1: no score above -inf yet.
struct Best {
  Vec score;
  IVec strip;
};

void pack(const float* codebook, int64_t codes, int64_t channels, bool cosine, int64_t index, float* packed) {
  const int64_t first = index * kStrip, count = min_i(kStrip, codes - first);
  float* panel = packed + kStrip;
  for (int64_t i = 0; i < kStrip; ++i)
    for (int64_t c = 0; c < channels; ++c)
      panel[c * kStrip + i] = i < count ? codebook[(first + i) * channels + c] : 0.0f;
  for (int64_t j = 0; j < kStrip; j += kWidth) {
    Vec squares = {};
    for (int64_t c = 0; c < channels; ++c) {
      const Vec v = load(panel + c * kStrip + j);
      squares += v * v;
    }
    if (cosine) {
      for (int i = 0; i < kWidth; ++i) squares[i] = __builtin_sqrtf(squares[i]);
      const Vec norm = squares < 1e-12f ? splat(1e-12f) : squares;  // a NaN stays
      for (int64_t c = 0; c < channels; ++c) store(panel + c * kStrip + j, load(panel + c * kStrip + j) / norm);
      squares = Vec{};
    }
    Vec start = squares * -0.5f;
    for (int i = 0; i < kWidth; ++i)
      if (j + i >= count) start[i] = -kInfinity;
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
    for (int j = 0; j < kVectors; ++j) top = max_v(acc[i][j], top);  // a NaN score loses: the second operand stays
    best[i].strip = top > best[i].score ? IVec{} + int32_t(index) : best[i].strip;
    best[i].score = top;
  }
}

// The lowest index with the highest score among the row's lanes.
int64_t resolve(const float* z, int64_t channels, const float* packed, const Best& best) {
  int64_t index = -1;
  float top = -kInfinity;
  for (int i = 0; i < kWidth; ++i) {
    if (best.strip[i] < 0 || best.score[i] < top) continue;
    if (best.score[i] > top || best.strip[i] < index) index = best.strip[i];
    top = best.score[i];
  }
  if (index < 0) return 0;
  Vec acc[1][kVectors];
  scores<1>(z, channels, packed + index * (channels + 1) * kStrip, acc);
  int64_t place = 0;
  top = -kInfinity;
  for (int64_t k = 0; k < kStrip; ++k) {
    const float score = acc[0][k / kWidth][k % kWidth];
    if (score > top) top = score, place = k;
  }
  return index * kStrip + place;
}

void search(const float* z, int64_t rows, int64_t channels, const float* packed, int64_t strips, int64_t* out) {
  Best best[kNearestCodeRows];
  for (int64_t i = 0; i < rows; ++i) best[i] = {splat(-kInfinity), IVec{} - 1};
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
const NearestCodeTable nearest_code_table = {kStrip, pack, search};

}  // namespace var_kernels::VAR_ISA
