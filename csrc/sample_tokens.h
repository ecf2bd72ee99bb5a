// The arguments of sample_tokens as the kernels see them. The kernels are compiled without torch's headers.
#pragma once
#include <cstdint>

#include "rows.h"

namespace var_kernels {

struct SampleTokens {
  Rows conditional, unconditional;  // (B, L, V); data of the second is null if there is no guidance
  float guidance;
  int64_t top_k;         // 0 keeps all
  float dropped;         // 1 - top_p, the probability that may be dropped; negative if top-p is off
  const float* noise;    // (B, L, V) dense, or null
  const int64_t* seeds;  // (B), or null
  int64_t offset;        // position of the first token
  int64_t* tokens;       // (B, L) dense
  int64_t batch, length, vocab;
};

// Philox4x32-10: its factors and the increments of its keys. Element v at a position takes the word with index
// v / 16 % 4 of the counter (16·(v / 64) + v % 16, position, 0, 0), so that sixteen neighbours take the same word of
// neighbouring counters.
constexpr uint32_t kPhiloxFactor0 = 0xd2511f53u, kPhiloxFactor1 = 0xcd9e8d57u;
constexpr uint32_t kPhiloxKey0 = 0x9e3779b9u, kPhiloxKey1 = 0xbb67ae85u;
constexpr int kPhiloxRounds = 10;

}  // namespace var_kernels
