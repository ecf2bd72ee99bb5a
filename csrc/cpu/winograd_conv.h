// Declarations that the C++ entry of winograd_conv (winograd_conv.cpp) and its vector code (winograd_conv.isa.cpp)
// share.
#pragma once
#include <cstdint>

namespace var_kernels {

// The columns of a strip of packed weights, and the multiples to which output channels and input channels are rounded
// up.
constexpr int64_t kWinogradStrip = 80, kWinogradColumns = 16, kWinogradDepth = 32;
// Unused elements between the points of a tile: without them all points would fall on the same sets of the first-level
// cache.
constexpr int64_t kWinogradGap = 32;

// A scheme computes a tile of outputs from a tile of inputs by products at points. The numbers are for one direction.
struct WinogradScheme {
  int outputs, inputs, points;
  int scale;  // outputs for each input

  int64_t tiles(int64_t side) const { return (side * scale + outputs - 1) / outputs; }

  // The scratch for `rows` tiles: products of one strip, transformed inputs, and the inputs of one tile at a border.
  int64_t scratch_floats(int64_t rows, int64_t depth, int64_t channels) const {
    return points * points * (rows * (kWinogradStrip + depth) + 2 * kWinogradGap) + inputs * inputs * channels;
  }
};
// Indexed by the raw op's argument `scheme`.
constexpr WinogradScheme kWinogradSchemes[] = {{2, 4, 4, 1}, {4, 6, 6, 1}, {2, 3, 3, 2}};
constexpr int kWinogradTypes = 3;  // float; bf16 multiplied as pairs; bf16 multiplied as floats

struct WinogradConv {
  const void* x;  // (B, H, W, C_in), dense
  const void* weight;
  const float* bias;
  const void* residual;  // like y, or null
  void* y;               // (B, scale·H, scale·W, C_out), dense
  int64_t height, width, in_channels, out_channels;
  bool stream;  // whether to store y past the caches; its rows then have whole, aligned 64-byte lines
};

struct WinogradFilters {
  const float* weight;      // (C_out, C_in, 3, 3), dense
  const double* transform;  // (points, 3)
  void* packed;             // strips of columns, each (points², depth, strip), or in bf16 (points², depth / 2, strip, 2)
  int64_t out_channels, in_channels, depth, columns;
  int points;
};

struct WinogradConvTable {
  // Computes output channels [column, end) of tiles [first, first + count) of one image, which are counted row by row.
  // `column` is a multiple of the strip. `scratch` is for `count` tiles, rounded up to a multiple of 16. An entry is
  // null if this level has no such product.
  void (*tiles[3][kWinogradTypes])(const WinogradConv&, int64_t image, int64_t first, int64_t count, int64_t column,
                                   int64_t end, float* scratch);
  // Transforms and packs the filters of kWinogradDepth input channels from `first` on for the strip of output channels
  // that begins at `column`. The table is indexed by whether bf16 is packed, as pairs.
  void (*pack[2])(const WinogradFilters&, int64_t column, int64_t first);
};

}  // namespace var_kernels
