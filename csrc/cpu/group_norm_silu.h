// Declarations that the C++ entry of group_norm_silu (group_norm_silu.cpp) and its vector code
// (group_norm_silu.isa.cpp) share.
#pragma once
#include <cstdint>

namespace var_kernels {

// The number of pixels whose moments are taken together, while the pixels are in the caches. It determines the order of
// summation, so it is a constant.
constexpr int64_t kGroupNormPixels = 64;

struct GroupNormTable {
  // Over `pixels` rows of `channels` at x: the mean of each channel, and the sum of the squared differences from it.
  void (*moments[3])(const void* x, int64_t pixels, int64_t channels, float* mean, float* squares);
  // y = x·factor + addend for each channel, over `pixels` rows, then y·sigmoid(y) with `silu`. With `stream`, y is
  // stored past the caches; its rows then have whole, aligned 64-byte lines.
  void (*apply[3])(const void* x, int64_t pixels, int64_t channels, const float* factor, const float* addend, bool silu,
                   bool stream, void* y);
};

}  // namespace var_kernels
