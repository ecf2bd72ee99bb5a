// Declarations that the C++ entries of multi_scale_quantize (multi_scale_quantize.cpp and
// multi_scale_quantize_backward.cpp) and its vector code share.
//
// A map is pixel-major: it has (height · width) pixels of `padded` floats, of which the first `channels` are in use and
// the others zero. A bordered map also has one pixel of zeros on every side, so that the nine taps of a convolution are
// nine views of it. At the sizes of the model family (16×16×32: 32 KiB) a map fits the cache beside the packed weights.
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
  const CubicTaps* vertical;    // one for each row of the full map; null if the codes have the full size already
  const CubicTaps* horizontal;  // one for each column of the full map
};

struct QuantizeForwardTable {
  int64_t vector_width;  // `padded` is the next multiple of it

  // Packs phi as ratio·weight (3, 3, in = padded, out = padded), ratio·bias (padded), and 1 - ratio, the weight of the
  // identity (padded). With `transposed` it packs the adjoint: out and in change places, the taps are mirrored, and the
  // bias is zero. weight is (channels, channels, 3, 3) and bias (channels), both dense.
  void (*pack_phi)(const float* weight, const float* bias, int64_t channels, float ratio, bool transposed,
                   float* packed);

  void (*load_rows)(const MapShape& shape, const Image& image, int64_t y0, int64_t y1, float* map);

  // Stores the map's rows [y0, y1) to out (channels, height, width), which is dense; NaN where `image` is not finite.
  void (*store_rows)(const MapShape& shape, const float* map, const Image& image, int64_t y0, int64_t y1, float* out);

  // Pools the map by area to (height, width), and stores pixels [first, first + count) as dense rows of `channels`
  // floats.
  void (*pool)(const MapShape& shape, const float* map, int64_t height, int64_t width, int64_t first, int64_t count,
               float* out);

  // Computes rows [y0, y1) of phi(bicubic(codes)), with row y at out + (y - y0) * out_row. It needs
  // phi_scratch_floats() floats of scratch.
  void (*phi_rows)(const MapShape& shape, const CodeMap& codes, const float* packed_phi, int64_t y0, int64_t y1,
                   float* scratch, float* out, int64_t out_row);
  int64_t (*phi_scratch_floats)(const MapShape& shape, int64_t rows, int64_t code_pixels);

  // f_hat += h and rest -= h over whole rows of the map; returns the sum of the squares of the new rest.
  double (*subtract_rows)(const MapShape& shape, int64_t rows, const float* h, float* f_hat, float* rest);
  void (*add_rows)(const MapShape& shape, int64_t rows, const float* h, float* map);
};

struct QuantizeBackwardTable {
  // `maps` holds `scales` bordered maps h_k. This replaces row y of each by the gradient of h_k, which is S_k = the sum
  // of g_j over j >= k with g_j = factors[j] · (f_hat_j - f), and stores row y of -S_0 to df (channels, height, width).
  // It needs width · padded floats of scratch.
  void (*suffix_sums)(const MapShape& shape, const Image& f, int64_t y, int64_t scales, const float* factors,
                      float* maps, float* scratch, float* df);

  // Computes the gradients of one scale from S (bordered). dweight (3, 3, in = channels, out = padded) and dbias
  // (padded) are stored or accumulated, and dcodes (height * width, padded) is stored. packed_adjoint is made by
  // pack_phi with `transposed`.
  void (*phi_backward)(const MapShape& shape, const CodeMap& codes, const float* packed_adjoint, const float* s,
                       float* scratch, bool accumulate, float* dweight, float* dbias, float* dcodes);
  int64_t (*scratch_floats)(const MapShape& shape, int64_t code_pixels);

  // dcodebook[tokens[i]] += dcodes[i], in the order of i, for tokens[i] in [first, end). dcodebook is (codes,
  // channels), dense.
  void (*scatter_add)(const MapShape& shape, const int64_t* tokens, int64_t count, const float* dcodes, int64_t first,
                      int64_t end, float* dcodebook);

  // sum[i] += part[i]; count is a multiple of vector_width.
  void (*add)(const float* part, int64_t count, float* sum);
};

}  // namespace var_kernels
