// What the door of winograd_conv (winograd_conv.cpp) and its vector code (winograd_conv.isa.cpp) share.
#pragma once
#include <cstdint>

namespace var_kernels {

// Columns of the packed weights that lie together, and what the two channel counts are rounded up to.
constexpr int64_t kWinogradStrip = 80, kWinogradColumns = 16, kWinogradDepth = 32;
// Elements between the points of a tile, beside those that they take: without them all points would fall on the same
// sets of the first-level cache.
constexpr int64_t kWinogradGap = 32;

// How a tile of outputs comes from inputs by way of products at points: numbers of each in one direction.
struct WinogradScheme {
  int outputs, inputs, points;
  int scale;  // outputs for each input

  int64_t tiles(int64_t side) const { return (side * scale + outputs - 1) / outputs; }

  // For `rows` tiles: products of one strip, transformed inputs, and the inputs of one tile at a border.
  int64_t scratch_floats(int64_t rows, int64_t depth, int64_t channels) const {
    return points * points * (rows * (kWinogradStrip + depth) + 2 * kWinogradGap) + inputs * inputs * channels;
  }
};
// By the values of the raw op's argument `scheme`.
constexpr WinogradScheme kWinogradSchemes[] = {{2, 4, 4, 1}, {4, 6, 6, 1}, {2, 3, 3, 2}};
constexpr int kWinogradTypes = 3;  // float; bf16 multiplied as pairs; bf16 multiplied as floats

struct WinogradConv {
  const void* x;  // (B, H, W, C_in), dense
  const void* weight;
  const float* bias;
  const void* residual;  // like y, or null
  void* y;               // (B, scale·H, scale·W, C_out), dense
  int64_t height, width, in_channels, out_channels;
  bool stream;  // y is stored past the caches: its rows are then multiples of 64 bytes, aligned to 64
};

struct WinogradConvTable {
  // Output channels [column, end) of tiles [first, first + count) of one image, row by row; `column` is a multiple of
  // the strip. Null where this level has no such product. `scratch` is that of `count` up to a multiple of 16.
  void (*tiles[3][kWinogradTypes])(const WinogradConv&, int64_t image, int64_t first, int64_t count, int64_t column,
                                   int64_t end, float* scratch);
};

}  // namespace var_kernels
