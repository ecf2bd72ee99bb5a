// The residual quantizer of VAR on CUDA devices. With f_hat = 0 and rest = f, for each scale k:
//   tokens_k = nearest_code(area_pool(rest, (h_k, w_k)))
//   h = (1 - ratio)·u + ratio·(conv3x3(u, weight) + bias)    u = bicubic(codebook[tokens_k])
//   f_hat += h    rest -= h    errors_k = sum of rest²
//
// There are two ways to compute this, and they give the same bits. Resident: one launch with a block for each image,
// whose residual map stays in shared memory through all scales. This has the least traffic and starts one kernel, but
// each image uses one multiprocessor only, so it is for batches that fill the GPU and for small models. Stepwise: the
// maps are in device memory, and each scale takes three or four launches, each of which is spread over the whole GPU.
#pragma once
#include "multi_scale_quantize_map.cuh"

namespace var_kernels {
namespace {

struct Quantize {
  ImageMaps f;
  const float *codebook, *searched;  // (codes, channels) dense; `searched` are normalised or counted from the centre
  const float* centre;               // (channels), or null for normalised codes
  Phi phi;
  float *f_hat, *rest;    // (images) maps; rest is used stepwise only
  float* out;             // (images, channels, height, width) dense
  int64_t* tokens;        // (images, length) dense
  float* errors;          // resident: (images, scales); stepwise: one for every tile, (images, scales, tiles)
  GpuMapShape shape;
  int codes, images, length, scales;
  bool normalised;
};

// Updates f_hat and rest of a thread's part of a tile for scale k, and returns the sum of its rest². `map` is the
// image's residual map. The last f_hat is written to `out`; it is NaN where f is not finite.
template <bool kVectors, bool kAhead, class Code>
__device__ __forceinline__ float update_tile(const Quantize& a, ConvolutionMemory& memory, int image, int k,
                                             const GpuScale& scale, const MapTile& tile, float* map, const Code& code) {
  const GpuMapShape& shape = a.shape;
  ConvolvedPixels h;
  convolve_tile<false, kAhead>(h, memory, shape, tile, weight_of(a.phi, scale.phi, shape), [&](int y, int x, int c) {
    return upsampled<kVectors>(shape, scale, y, x, c, code);
  });
  const int c = tile.channel + thread_channel();
  const float4 bias = load_bias(a.phi, scale.phi, shape, c);
  float* const f_hat = a.f_hat + image * shape.floats();
  float squares = 0.0f;
  for_own_pixels(shape, tile, [&](int p, int pixel) {
    const float4 added = h.mixed(p, a.phi.ratio, bias);
    const int64_t at = int64_t(pixel) * shape.pitch + c;
    float4 sum = k == 0 ? float4{} : *reinterpret_cast<const float4*>(f_hat + at);
    float4 rest = *reinterpret_cast<const float4*>(map + at);
    add_scaled(sum, 1.0f, added);
    add_scaled(rest, -1.0f, added);
    squares = fmaf(rest.x, rest.x, fmaf(rest.y, rest.y, fmaf(rest.z, rest.z, fmaf(rest.w, rest.w, squares))));
    *reinterpret_cast<float4*>(map + at) = rest;
    if (k + 1 < a.scales) {
      *reinterpret_cast<float4*>(f_hat + at) = sum;
      return;
    }
    const float4 f = a.f.load(image, pixel / shape.width, pixel % shape.width, c, shape.channels);
    store_channels(a.out + int64_t(image) * shape.channels * shape.pixels(), shape, pixel, c,
                   {sum.x + (f.x - f.x), sum.y + (f.y - f.y), sum.z + (f.z - f.z), sum.w + (f.w - f.w)});
  });
  return squares;
}

// ---- resident -----------------------------------------------------------------------------------------------------

// The tiles of the search, for many tokens, for some, and for few.
using ManyTokens = SearchTile<8, 8, 4, 2>;
using SomeTokens = SearchTile<8, 4, 2, 4>;
using FewTokens = SearchTile<2, 4, 2, 4>;
static_assert(ManyTokens::kThreads == kMapThreads && SomeTokens::kThreads == kMapThreads);

__host__ __device__ constexpr int pooled_pitch(int channels) { return (channels + kChunk - 1) / kChunk * kChunk + 4; }

// Shared memory holds the residual map, the tokens of a scale, and what the search or the convolution needs, in turn.
inline size_t resident_shared_bytes(const GpuMapShape& shape, int largest) {
  const size_t search =
      sizeof(SearchMemory<ManyTokens>) + sizeof(float) * ManyTokens::kRows * pooled_pitch(shape.channels);
  const size_t step = search > sizeof(ConvolutionMemory) ? search : sizeof(ConvolutionMemory);
  return step + sizeof(float) * shape.pixels() * shape.pitch + sizeof(int) * ((largest + 3) / 4 * 4);
}

struct ResidentQuantize {
  Quantize problem;
  int largest;  // the largest number of tokens of a scale
  GpuScale schedule[kMostScales];
};

template <class Tile, bool kVectors>
__device__ __forceinline__ void search_tokens(const Quantize& a, unsigned char* shared, const float* rest,
                                              const GpuScale& scale, int first, int image, int* tokens) {
  auto& memory = *reinterpret_cast<SearchMemory<Tile>*>(shared);
  float* const z = reinterpret_cast<float*>(&memory + 1);
  const int pitch = pooled_pitch(a.shape.channels), pieces = (pitch - 4) / 4;
  for (int i = int(threadIdx.x); i < Tile::kRows * pieces; i += kMapThreads) {
    const int row = i / pieces, c = i % pieces * 4;
    float4 mean = {};
    if (first + row < scale.tokens() && c < a.shape.channels) {
      mean = pooled(a.shape, rest, scale.height, scale.width, first + row, c);
      if (a.centre != nullptr) add_scaled(mean, -1.0f, load_channels<kVectors>(a.centre, c, a.shape.channels));
    }
    *reinterpret_cast<float4*>(z + row * pitch + c) = mean;
  }
  const Matrix codebook = {a.searched, a.shape.channels, a.codes, a.shape.channels};
  const Candidate best = search_codes<Tile>(
      memory, 0, a.codes, a.shape.channels, a.normalised, pitch, [&](int, int chunk) { return z + chunk * kChunk; },
      [&](int, int code, int channel, float* target) {
        start_chunk<kVectors>(target, Tile::kCodes, codebook, code, channel);
      });
  const int token = first + int(threadIdx.x);
  if (int(threadIdx.x) >= Tile::kRows || token >= scale.tokens()) return;
  tokens[token] = best.index;
  a.tokens[int64_t(image) * a.length + scale.first_token + token] = best.index;
}

template <bool kVectors>
__global__ void __launch_bounds__(kMapThreads, 1)
    quantize_resident_kernel(const __grid_constant__ ResidentQuantize resident) {
  VAR_DYN_SMEM(shared);
  __shared__ float exchange[kMapThreads / 32];
  const Quantize& a = resident.problem;
  const GpuMapShape& shape = a.shape;
  const int image = int(blockIdx.x);
  float* const rest = reinterpret_cast<float*>(shared);
  int* const tokens = reinterpret_cast<int*>(rest + shape.floats());
  unsigned char* const step = reinterpret_cast<unsigned char*>(tokens + (resident.largest + 3) / 4 * 4);
  for (int i = int(threadIdx.x); i < shape.pixels() * (shape.pitch / 4); i += kMapThreads) {
    const int pixel = i % shape.pixels(), c = i / shape.pixels() * 4;
    *reinterpret_cast<float4*>(rest + int64_t(pixel) * shape.pitch + c) =
        a.f.load(image, pixel / shape.width, pixel % shape.width, c, shape.channels);
  }
  for (int k = 0; k < a.scales; ++k) {
    const GpuScale& scale = resident.schedule[k];
    for (int first = 0; first < scale.tokens();) {
      __syncthreads();  // the residual is complete; all threads are done with the search and the convolution
      const int left = scale.tokens() - first;
      if (left > SomeTokens::kRows) {
        search_tokens<ManyTokens, kVectors>(a, step, rest, scale, first, image, tokens);
        first += ManyTokens::kRows;
      } else if (left > 2 * FewTokens::kRows) {
        search_tokens<SomeTokens, kVectors>(a, step, rest, scale, first, image, tokens);
        first += SomeTokens::kRows;
      } else {
        search_tokens<FewTokens, kVectors>(a, step, rest, scale, first, image, tokens);
        first += FewTokens::kRows;
      }
    }
    float squares = 0.0f;
    for (int index = 0; index < shape.tiles() * shape.channel_tiles(); ++index)
      squares += update_tile<kVectors, true>(
          a, *reinterpret_cast<ConvolutionMemory*>(step), image, k, scale,
          tile_at(shape, index / shape.channel_tiles(), index % shape.channel_tiles()), rest,
          [&](int q) { return a.codebook + int64_t(tokens[q]) * shape.channels; });
    const float error = block_sum(squares, exchange);
    if (threadIdx.x == 0) a.errors[int64_t(image) * a.scales + k] = error;
  }
}

// ---- stepwise -----------------------------------------------------------------------------------------------------

// Copies f to the images' maps, (images, pixels, pitch).
__global__ void __launch_bounds__(kMapThreads) load_maps_kernel(ImageMaps f, GpuMapShape shape, int images,
                                                               float* maps) {
  const ImagePart part = my_part(shape.pixels() * (shape.pitch / 4), images);
  if (!part.exists) return;
  const int pixel = part.index % shape.pixels(), c = part.index / shape.pixels() * 4;
  *reinterpret_cast<float4*>(maps + part.image * shape.floats() + int64_t(pixel) * shape.pitch + c) =
      f.load(part.image, pixel / shape.width, pixel % shape.width, c, shape.channels);
}

// Pools maps to (height, width), and subtracts the centre from the means if it is not null. `out` is (images,
// height · width, channels), dense.
__global__ void __launch_bounds__(kMapThreads)
    pool_kernel(const float* maps, GpuMapShape shape, int images, int height, int width, const float* centre,
                float* out) {
  const int pieces = shape.pitch / 4;
  const ImagePart part = my_part(height * width * pieces, images);
  if (!part.exists) return;
  const int token = part.index / pieces, c = part.index % pieces * 4;
  const float4 mean = pooled(shape, maps + part.image * shape.floats(), height, width, token, c);
  const float values[4] = {mean.x, mean.y, mean.z, mean.w};
  float* const row = out + (part.image * height * width + token) * shape.channels;
#pragma unroll
  for (int n = 0; n < 4; ++n)
    if (c + n < shape.channels) row[c + n] = values[n] - (centre == nullptr ? 0.0f : centre[c + n]);
}

// The grid is the tiles of all images by tiles of channels.
template <bool kVectors>
__global__ void __launch_bounds__(kMapThreads, 2)
    quantize_update_kernel(const __grid_constant__ Quantize a, GpuScale scale, int k) {
  VAR_DYN_SMEM(shared);
  __shared__ float exchange[kMapThreads / 32];
  const int tiles = a.shape.tiles(), image = int(blockIdx.x) / tiles, tile = int(blockIdx.x) % tiles;
  const int64_t* const tokens = a.tokens + int64_t(image) * a.length + scale.first_token;
  const float squares = update_tile<kVectors, false>(
      a, *reinterpret_cast<ConvolutionMemory*>(shared), image, k, scale, tile_at(a.shape, tile, blockIdx.y),
      a.rest + image * a.shape.floats(), [&](int q) { return a.codebook + tokens[q] * a.shape.channels; });
  const float error = block_sum(squares, exchange);
  if (threadIdx.x == 0)
    a.errors[((int64_t(image) * a.scales + k) * gridDim.y + blockIdx.y) * tiles + tile] = error;
}

// Adds up each `count` consecutive numbers, in their order.
__global__ void __launch_bounds__(kMapThreads) sum_tiles_kernel(const float* parts, int count, int sums, float* out) {
  const int i = int(blockIdx.x) * kMapThreads + int(threadIdx.x);
  if (i >= sums) return;
  float sum = 0.0f;
  for (int n = 0; n < count; ++n) sum += parts[int64_t(i) * count + n];
  out[i] = sum;
}

// ---- a step of sampling -------------------------------------------------------------------------------------------

struct AddScale {
  ImageMaps f_hat;
  const float* codes;  // (images, tokens, channels) dense rows
  int64_t image_stride, row_stride;
  Phi phi;
  float* out;  // (images, channels, height, width) dense
  float* map;  // (images) maps, or null
  GpuMapShape shape;
};

// Computes f_hat + phi of the upsampled codes. The grid is the tiles of all images by tiles of channels.
template <bool kVectors>
__global__ void __launch_bounds__(kMapThreads, 2) add_scale_kernel(const __grid_constant__ AddScale a, GpuScale scale) {
  VAR_DYN_SMEM(shared);
  const GpuMapShape& shape = a.shape;
  const int tiles = shape.tiles(), image = int(blockIdx.x) / tiles;
  const MapTile tile = tile_at(shape, int(blockIdx.x) % tiles, blockIdx.y);
  const float* const codes = a.codes + image * a.image_stride;
  ConvolvedPixels h;
  convolve_tile<false, false>(h, *reinterpret_cast<ConvolutionMemory*>(shared), shape, tile,
                       weight_of(a.phi, scale.phi, shape), [&](int y, int x, int c) {
                         return upsampled<kVectors>(shape, scale, y, x, c,
                                                    [&](int q) { return codes + q * a.row_stride; });
                       });
  const int c = tile.channel + thread_channel();
  const float4 bias = load_bias(a.phi, scale.phi, shape, c);
  for_own_pixels(shape, tile, [&](int p, int pixel) {
    float4 sum = a.f_hat.load(image, pixel / shape.width, pixel % shape.width, c, shape.channels);
    add_scaled(sum, 1.0f, h.mixed(p, a.phi.ratio, bias));
    store_channels(a.out + int64_t(image) * shape.channels * shape.pixels(), shape, pixel, c, sum);
    if (a.map != nullptr)
      *reinterpret_cast<float4*>(a.map + image * shape.floats() + int64_t(pixel) * shape.pitch + c) = sum;
  });
}

}  // namespace
}  // namespace var_kernels
