// Declarations that the C++ entry of nearest_code (nearest_code.cpp) and its vector code (nearest_code.isa.cpp) share.
#pragma once
#include <cstdint>

#include "../nearest_code_centre.h"

namespace var_kernels {

// The centre of a codebook is a point near its codes. Distances stay the same if it is subtracted from codes and
// vectors, while the scores become as small as the distances, and so do their rounding errors. In each channel it is
// the middle between the least and the greatest finite element of kCentreCodes codes, if it is farther from 0 than they
// are apart; else it is 0, and nothing is subtracted.
struct NearestCodeTable {
  int64_t strip;  // codes per strip of the packed codebook; a strip is (channels + 1) · strip floats

  // Writes the centre of the (codes, channels) codebook, and returns whether it has an element that is not 0.
  bool (*find_centre)(const float* codebook, int64_t codes, int64_t channels, float* centre);

  // x -= centre in every row of x (rows, channels), dense.
  void (*subtract)(const float* centre, int64_t rows, int64_t channels, float* x);

  // Packs codes [index · strip, (index + 1) · strip) of the (codes, channels) codebook into `packed`, 64-byte aligned.
  // The centre is subtracted from them if it is not null.
  void (*pack)(const float* codebook, int64_t codes, int64_t channels, const float* centre, bool cosine, int64_t index,
               float* packed);

  // best[i] = index of the best code for row i of z (rows, channels), over all `strips` strips. The rows of z must have
  // been centred like the codes.
  void (*search)(const float* z, int64_t rows, int64_t channels, const float* packed, int64_t strips, int64_t* best);
};

// The largest number of rows in one call of `search`. Their running maxima stay in L1 while the strips are read.
constexpr int64_t kNearestCodeRows = 96;

// Packing an element of the codebook takes about as long as this number of multiply-adds.
constexpr int64_t kNearestCodePackWork = 4;

// The number of rows in one task if `rows` rows are searched. Rows are independent, so no result depends on it.
int64_t nearest_code_task_rows(int64_t rows);

}  // namespace var_kernels
