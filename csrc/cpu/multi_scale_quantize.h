// What the door of multi_scale_quantize (multi_scale_quantize.cpp) and its vector code share.
//
// A map is pixel-major: (height · width) pixels of `padded` floats, of which the first `channels` are in use and the
// others zero. A bordered map has one pixel of zeros on every side, so that the nine taps of a convolution are nine
// views of it. Both fit the cache next to the packed weights at the sizes of the model family (16×16×32: 32 KiB).
#pragma once
#include <cstdint>

namespace var_kernels {

// One image (channels, height, width) in memory of any strides.
struct Image {
  const float* data;
  int64_t channel_stride, row_stride, column_stride;
};

struct MapShape {
  int64_t channels, padded, height, width;
};

// The four neighbours of one coordinate of the full map along one axis, and their weights.
struct CubicTaps {
  int32_t index[4];
  float weight[4];
};

// The codes of one image at one scale, and how they are upsampled to the full map.
struct CodeMap {
  const float* rows;      // the code of pixel p: `channels` floats at rows + (tokens ? tokens[p] : p) * row_stride
  int64_t row_stride;
  const int64_t* tokens;  // (height * width), or null
  int64_t height, width;
  const CubicTaps* vertical;    // per row of the full map; null: the map has the full size already
  const CubicTaps* horizontal;  // per column of the full map
};

struct QuantizeForwardTable {
  int64_t vector_width;  // `padded` is the next multiple of it

  // phi packed as ratio·weight (3, 3, in = padded, out = padded), ratio·bias (padded), and 1 - ratio, the weight of
  // the identity (padded). With `transposed` it is the adjoint: out and in change places, the taps are mirrored, the
  // bias is zero. weight (channels, channels, 3, 3), bias (channels), dense.
  void (*pack_phi)(const float* weight, const float* bias, int64_t channels, float ratio, bool transposed,
                   float* packed);

  void (*load_rows)(const MapShape& shape, const Image& image, int64_t y0, int64_t y1, float* map);

  // out (channels, height, width), dense, becomes the map's rows [y0, y1), NaN where `image` is not finite.
  void (*store_rows)(const MapShape& shape, const float* map, const Image& image, int64_t y0, int64_t y1, float* out);

  // Area pooling to (height, width): pixels [first, first + count) as dense rows of `channels` floats.
  void (*pool)(const MapShape& shape, const float* map, int64_t height, int64_t width, int64_t first, int64_t count,
               float* out);

  // Rows [y0, y1) of phi(bicubic(codes)), row y at out + (y - y0) * out_row. Needs phi_scratch_floats() of scratch.
  void (*phi_rows)(const MapShape& shape, const CodeMap& codes, const float* packed_phi, int64_t y0, int64_t y1,
                   float* scratch, float* out, int64_t out_row);
  int64_t (*phi_scratch_floats)(const MapShape& shape, int64_t rows, int64_t code_pixels);

  // f_hat += h, rest -= h over whole rows of the map; the sum of the squares of the new rest.
  double (*subtract_rows)(const MapShape& shape, int64_t rows, const float* h, float* f_hat, float* rest);
  void (*add_rows)(const MapShape& shape, int64_t rows, const float* h, float* map);
};

struct QuantizeBackwardTable {
  // `maps` holds one bordered map per scale, h_k, `scales` of them; they become S_k = sum of g_j over j >= k with
  // g_j = factors[j] · (f_hat_j - f), the gradient of h_k. Row y only; its negated S_0 goes to df (channels, height,
  // width). Needs width · padded floats of scratch.
  void (*suffix_sums)(const MapShape& shape, const Image& f, int64_t y, int64_t scales, const float* factors,
                      float* maps, float* scratch, float* df);

  // The gradients of one scale from S (bordered): dweight (3, 3, in = channels, out = padded) and dbias (padded) are
  // stored or accumulated, dcodes (height * width, padded) is stored. packed_adjoint: pack_phi(transposed).
  void (*phi_backward)(const MapShape& shape, const CodeMap& codes, const float* packed_adjoint, const float* s,
                       float* scratch, bool accumulate, float* dweight, float* dbias, float* dcodes);
  int64_t (*scratch_floats)(const MapShape& shape, int64_t code_pixels);

  // dcodebook[tokens[i]] += dcodes[i], in order, for the tokens in [first, end); dcodebook (codes, channels) dense.
  void (*scatter_add)(const MapShape& shape, const int64_t* tokens, int64_t count, const float* dcodes, int64_t first,
                      int64_t end, float* dcodebook);

  // sum[i] += part[i]; count is a multiple of vector_width.
  void (*add)(const float* part, int64_t count, float* sum);
};

}  // namespace var_kernels
