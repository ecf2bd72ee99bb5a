// The gradients of E = sum over images and scales of derrors · |f_hat_k - f|², for known tokens.
//
// With f_hat_k = h_0 + … + h_k, the gradient of h_k is S_k = sum over j >= k of 2 · derrors_j · (f_hat_j - f), that of
// f is -S_0, and from S_k each scale has its own gradients through h = (1 - ratio)·u + ratio·(conv(u) + bias):
//   dweight[tap] = ratio · sum over pixels of u[pixel + tap] S[pixel]ᵀ        dbias = ratio · sum over pixels of S
//   du = (1 - ratio)·S + ratio·conv(S), with the weights mirrored and transposed
//   dcodes = bicubic upsampling's adjoint, applied to du        dcodebook[v] = sum of dcodes over the tokens equal to v
//
// In backward no scale depends on another one, so each kernel takes all scales of all images. Two maps per image and
// scale are stored: h, which becomes S, and du. u is not stored but upsampled again. There are no atomics, so all sums
// have one order.
#pragma once
#include "multi_scale_quantize_map.cuh"

namespace var_kernels {
namespace {

struct QuantizeBackward {
  ImageMaps f;
  const float* codebook;  // (codes, channels) dense
  const int64_t* tokens;  // (images, length) dense
  const float* derrors;   // (images, scales)
  int64_t derrors_image, derrors_scale;  // strides
  Phi phi;
  float *maps, *dmaps;    // (images, scales) maps
  float* dcodes;          // (images · length, pitch)
  float* partials;        // (slices, scales, 9 · channels² + channels)
  float *df, *dcodebook, *dweight, *dbias;
  GpuMapShape shape;
  int codes, images, length, scales, convolutions;
  int slice_images, slices;
  GpuScale schedule[kMostScales];

  __device__ __forceinline__ int phi_floats() const { return (9 * shape.channels + 1) * shape.channels; }
};
static_assert(sizeof(QuantizeBackward) <= 4096);

// Which map, and which tile of it, a block has. The grid is the tiles of all maps by tiles of channels.
struct MapPlace {
  int map, image, k;
  MapTile tile;
};
__device__ __forceinline__ MapPlace my_map(const QuantizeBackward& a) {
  const int tiles = a.shape.tiles(), map = int(blockIdx.x) / tiles;
  return {map, map / a.scales, map % a.scales, tile_at(a.shape, int(blockIdx.x) % tiles, blockIdx.y)};
}

// Pixel (y, x), channels [c, c + 4) of u.
template <bool kVectors>
__device__ __forceinline__ float4 code_pixel(const QuantizeBackward& a, int image, const GpuScale& scale, int y, int x,
                                             int c) {
  const int64_t* const tokens = a.tokens + int64_t(image) * a.length + scale.first_token;
  return upsampled<kVectors>(a.shape, scale, y, x, c,
                             [&](int q) { return a.codebook + tokens[q] * a.shape.channels; });
}

__device__ __forceinline__ void store_mixed(const QuantizeBackward& a, const MapPlace& place, const ConvolvedPixels& h,
                                            const float4& bias, float* maps) {
  for_own_pixels(a.shape, place.tile, [&](int p, int pixel) {
    *reinterpret_cast<float4*>(maps + int64_t(place.map) * a.shape.floats() + int64_t(pixel) * a.shape.pitch +
                               place.tile.channel + thread_channel()) = h.mixed(p, a.phi.ratio, bias);
  });
}

// ---- h, then S ----------------------------------------------------------------------------------------------------

template <bool kVectors>
__global__ void __launch_bounds__(kMapThreads, 2) scale_maps_kernel(const __grid_constant__ QuantizeBackward a) {
  VAR_DYN_SMEM(shared);
  const MapPlace place = my_map(a);
  const GpuScale& scale = a.schedule[place.k];
  ConvolvedPixels h;
  convolve_tile<false, false>(h, *reinterpret_cast<ConvolutionMemory*>(shared), a.shape, place.tile,
                       weight_of(a.phi, scale.phi, a.shape),
                       [&](int y, int x, int c) { return code_pixel<kVectors>(a, place.image, scale, y, x, c); });
  store_mixed(a, place, h, load_bias(a.phi, scale.phi, a.shape, place.tile.channel + thread_channel()), a.maps);
}

// Replaces h_k of every image by S_k, and stores df = -S_0. A thread has four channels of a pixel.
__global__ void __launch_bounds__(kMapThreads) suffix_sums_kernel(const __grid_constant__ QuantizeBackward a) {
  const GpuMapShape& shape = a.shape;
  const ImagePart part = my_part(shape.pixels() * (shape.pitch / 4), a.images);
  if (!part.exists) return;
  const int pixel = part.index % shape.pixels(), c = part.index / shape.pixels() * 4;
  float* const maps = a.maps + part.image * a.scales * shape.floats() + int64_t(pixel) * shape.pitch + c;
  const float* const factors = a.derrors + part.image * a.derrors_image;
  float4 difference = {}, total = {};
  add_scaled(difference, -1.0f, a.f.load(part.image, pixel / shape.width, pixel % shape.width, c, shape.channels));
  for (int k = 0; k < a.scales; ++k)
    add_scaled(difference, 1.0f, *reinterpret_cast<const float4*>(maps + k * shape.floats()));
  for (int k = a.scales - 1; k >= 0; --k) {
    float4* const map = reinterpret_cast<float4*>(maps + k * shape.floats());
    const float4 h = *map;
    add_scaled(total, 2.0f * factors[k * a.derrors_scale], difference);
    *map = total;
    add_scaled(difference, -1.0f, h);
  }
  store_channels(a.df + part.image * shape.channels * shape.pixels(), shape, pixel, c,
                 {-total.x, -total.y, -total.z, -total.w});
}

// ---- the gradients of phi -----------------------------------------------------------------------------------------

constexpr int kStripRows = 8;  // rows of a tile at a time; a multiprocessor has room for two strips and more

struct PhiGradientMemory {
  float u[(kStripRows + 2) * kBorderedSide * kTileChannels], s[kStripRows * kTileSide * kTileChannels];
};

// Sums over the pixels of a slice of the images, for 32 by 32 channels of all nine taps. A thread has one channel of
// the input and four of the output. From pixel to pixel of a row it keeps the input's 3×3 neighbourhood in registers.
// The grid is the pairs of tiles of channels by scales by slices.
template <bool kVectors>
__global__ void __launch_bounds__(kMapThreads, 2) phi_gradients_kernel(const __grid_constant__ QuantizeBackward a) {
  VAR_DYN_SMEM(shared);
  auto& memory = *reinterpret_cast<PhiGradientMemory*>(shared);
  const GpuMapShape& shape = a.shape;
  const int parts = shape.channel_tiles(), k = int(blockIdx.y), slice = int(blockIdx.z);
  const int input = int(blockIdx.x) % parts * kTileChannels, output = int(blockIdx.x) / parts * kTileChannels;
  const int i = int(threadIdx.x) / kPieces, o = int(threadIdx.x) % kPieces * 4;
  const GpuScale& scale = a.schedule[k];
  const int last = min((slice + 1) * a.slice_images, a.images);
  float4 sums[9] = {}, total = {};
  for (int image = slice * a.slice_images; image < last; ++image) {
    const float* const map = a.maps + (int64_t(image) * a.scales + k) * shape.floats();
    for (int strip = 0; strip < shape.tiles() * (kTileSide / kStripRows); ++strip) {
      const MapTile tile = tile_at(shape, strip / (kTileSide / kStripRows), 0);
      const int y0 = tile.y + strip % (kTileSide / kStripRows) * kStripRows;
      if (y0 >= shape.height) continue;
      __syncthreads();  // all threads are done with the previous strip
      fill_pixels(memory.u, kStripRows + 2, kBorderedSide, shape, y0 - 1, tile.x - 1, input,
                  [&](int y, int x, int c) { return code_pixel<kVectors>(a, image, scale, y, x, c); });
      fill_pixels(memory.s, kStripRows, kTileSide, shape, y0, tile.x, output,
                  [&](int y, int x, int c) { return load_pixel(map, shape, y, x, c); });
      __syncthreads();
      for (int row = 0; row < kStripRows; ++row) {
        const float* const u = memory.u + row * kBorderedSide * kTileChannels + i;
        float left[3], middle[3];
#pragma unroll
        for (int ky = 0; ky < 3; ++ky) {
          left[ky] = u[ky * kBorderedSide * kTileChannels];
          middle[ky] = u[(ky * kBorderedSide + 1) * kTileChannels];
        }
#pragma unroll 4
        for (int x = 0; x < kTileSide; ++x) {
          const float4 s = *reinterpret_cast<const float4*>(memory.s + (row * kTileSide + x) * kTileChannels + o);
          add_scaled(total, 1.0f, s);
#pragma unroll
          for (int ky = 0; ky < 3; ++ky) {
            const float right = u[(ky * kBorderedSide + x + 2) * kTileChannels];
            add_scaled(sums[3 * ky], left[ky], s);
            add_scaled(sums[3 * ky + 1], middle[ky], s);
            add_scaled(sums[3 * ky + 2], right, s);
            left[ky] = middle[ky];
            middle[ky] = right;
          }
        }
      }
    }
  }
  float* const partial = a.partials + (int64_t(slice) * a.scales + k) * a.phi_floats();
  const int channels = shape.channels;
  const auto store = [&](float* row, const float4& v) {
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (output + o + n < channels) row[output + o + n] = values[n];
  };
  if (input + i >= channels) return;
#pragma unroll
  for (int tap = 0; tap < 9; ++tap) store(partial + (tap * channels + input + i) * channels, sums[tap]);
  if (input + i == 0) store(partial + 9 * channels * channels, total);
}

// Adds the partial sums of the scales that a convolution serves, in their order. There is a thread for each entry. The
// grid is the blocks of entries by convolutions.
__global__ void __launch_bounds__(kMapThreads) reduce_phi_kernel(const __grid_constant__ QuantizeBackward a) {
  const int entry = int(blockIdx.x) * kMapThreads + int(threadIdx.x), convolution = int(blockIdx.y);
  const int channels = a.shape.channels, weights = 9 * channels * channels;
  if (entry >= a.phi_floats()) return;
  float total = 0.0f;
  for (int k = 0; k < a.scales; ++k)
    for (int slice = 0; a.schedule[k].phi == convolution && slice < a.slices; ++slice)
      total += a.partials[(int64_t(slice) * a.scales + k) * a.phi_floats() + entry];
  total *= a.phi.ratio;
  if (entry >= weights) {
    a.dbias[convolution * channels + entry - weights] = total;
    return;
  }
  const int tap = entry / (channels * channels), i = entry / channels % channels, o = entry % channels;
  a.dweight[((int64_t(convolution) * channels + o) * channels + i) * 9 + tap] = total;
}

// ---- the gradients of the codes -----------------------------------------------------------------------------------

// Computes du of every map.
__global__ void __launch_bounds__(kMapThreads, 2) code_maps_kernel(const __grid_constant__ QuantizeBackward a) {
  VAR_DYN_SMEM(shared);
  const MapPlace place = my_map(a);
  const float* const map = a.maps + int64_t(place.map) * a.shape.floats();
  ConvolvedPixels du;
  convolve_tile<true, false>(du, *reinterpret_cast<ConvolutionMemory*>(shared), a.shape, place.tile,
                      weight_of(a.phi, a.schedule[place.k].phi, a.shape),
                      [&](int y, int x, int c) { return load_pixel(map, a.shape, y, x, c); });
  store_mixed(a, place, du, {}, a.dmaps);
}

// The weight that pixel `at` of the full axis gives to pixel `index` of an axis of `size` pixels.
__device__ __forceinline__ float cubic_weight(int index, int at, int size, float ratio) {
  const CubicPosition position = cubic_position(at, size, ratio);
  float weight = 0.0f;
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) weight += position.index(tap, size) == index ? position.weight(tap) : 0.0f;
  return weight;
}

// The pixels of the full axis, from `begin` to `end`, in which pixel `index` of an axis of `size` may have a weight.
// They are up to two and a half pixels away, plus one for rounding. 64-bit numbers, because sides are up to 2^30.
struct Reach {
  int begin, end;
};
__device__ __forceinline__ Reach reach_of(int index, int size, int full) {
  const int64_t begin = (2 * int64_t(index) - 3) * full / (2 * int64_t(size)) - 1;
  const int64_t end = (2 * int64_t(index) + 5) * full / (2 * int64_t(size)) + 2;
  return {int(max(begin, int64_t(0))), int(min(end, int64_t(full)))};
}

// The adjoint of upsampling, which gives dcodes. There is a warp for each token: four lanes of rows of pixels by eight
// lanes of four channels. The grid is the tokens of all images by tiles of channels.
__global__ void __launch_bounds__(kMapThreads) downsample_kernel(const __grid_constant__ QuantizeBackward a) {
  const GpuMapShape& shape = a.shape;
  const int64_t token = int64_t(blockIdx.x) * (kMapThreads / 32) + threadIdx.x / 32;
  if (token >= int64_t(a.images) * a.length) return;  // the whole warp
  const int image = int(token / a.length), place = int(token % a.length);
  const int lane = int(threadIdx.x) % 32, c = int(blockIdx.y) * kTileChannels + lane % kPieces * 4;
  int k = 0;
  while (k + 1 < a.scales && a.schedule[k + 1].first_token <= place) ++k;
  const GpuScale& scale = a.schedule[k];
  const int i = (place - scale.first_token) / scale.width, j = (place - scale.first_token) % scale.width;
  const float* const map = a.dmaps + (int64_t(image) * a.scales + k) * shape.floats();
  const bool resized = scale.height != shape.height || scale.width != shape.width, exists = c < shape.channels;
  float4 sum = {};
  if (!resized) {
    if (exists && lane < kPieces) sum = load_pixel(map, shape, i, j, c);
  } else {
    const Reach rows = reach_of(i, scale.height, shape.height), columns = reach_of(j, scale.width, shape.width);
    for (int y = rows.begin + lane / kPieces; y < rows.end; y += 32 / kPieces) {
      float4 line = {};
      for (int x = columns.begin; x < columns.end; ++x)
        if (exists) add_scaled(line, cubic_weight(j, x, scale.width, scale.ratio_x), load_pixel(map, shape, y, x, c));
      add_scaled(sum, cubic_weight(i, y, scale.height, scale.ratio_y), line);
    }
  }
#pragma unroll
  for (int lanes = kPieces; lanes < 32; lanes *= 2) {
    sum.x += __shfl_xor_sync(kFullWarp, sum.x, lanes);
    sum.y += __shfl_xor_sync(kFullWarp, sum.y, lanes);
    sum.z += __shfl_xor_sync(kFullWarp, sum.z, lanes);
    sum.w += __shfl_xor_sync(kFullWarp, sum.w, lanes);
  }
  if (exists && lane < kPieces) *reinterpret_cast<float4*>(a.dcodes + token * shape.pitch + c) = sum;
}

// Computes dcodebook. A warp for each code goes through all tokens, 32 at a time, and adds the rows of the tokens that
// equal its code, in their order; there is a lane for each channel. The grid is the codes by 32 channels.
__global__ void __launch_bounds__(kMapThreads) sum_tokens_kernel(const __grid_constant__ QuantizeBackward a) {
  const int code = int(blockIdx.x) * (kMapThreads / 32) + int(threadIdx.x) / 32;
  if (code >= a.codes) return;  // the whole warp
  const int lane = int(threadIdx.x) % 32, c = int(blockIdx.y) * 32 + lane;
  const int64_t count = int64_t(a.images) * a.length;
  float sum = 0.0f;
  for (int64_t first = 0; first < count; first += 32) {
    const bool mine = first + lane < count && a.tokens[first + lane] == code;
    for (unsigned found = __ballot_sync(kFullWarp, mine); found != 0; found &= found - 1)
      if (c < a.shape.channels) sum += a.dcodes[(first + __ffs(int(found)) - 1) * a.shape.pitch + c];
  }
  if (c < a.shape.channels) a.dcodebook[int64_t(code) * a.shape.channels + c] = sum;
}

}  // namespace
}  // namespace var_kernels
