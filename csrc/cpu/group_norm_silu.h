// What the door of group_norm_silu (group_norm_silu.cpp) and its vector code (group_norm_silu.isa.cpp) share.
#pragma once
#include <cstdint>

namespace var_kernels {

// Pixels whose moments are taken together, exactly, while they lie in the caches: the order of summation, so a constant.
constexpr int64_t kGroupNormPixels = 64;

struct GroupNormTable {
  // Of `pixels` rows of `channels` at x: the mean of each channel, and the sum of squares of what is left without it.
  void (*moments[3])(const void* x, int64_t pixels, int64_t channels, float* mean, float* squares);
  // y = x·factor + addend, for each channel, over `pixels` rows; then y·sigmoid(y) with `silu`. With `stream` it is
  // stored past the caches: rows of y are then multiples of 64 bytes, aligned to 64.
  void (*apply[3])(const void* x, int64_t pixels, int64_t channels, const float* factor, const float* addend, bool silu,
                   bool stream, void* y);
};

}  // namespace var_kernels
