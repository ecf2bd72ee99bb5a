// What the kernels of multi_scale_quantize share: maps, bicubic upsampling, and the convolution phi of a tile.
//
// A map of an image is pixel-major, (height · width, pitch) floats, so a code (a row of the codebook) is one pixel. The
// pitch is the number of channels rounded up to a multiple of 4, and the padding is zero, so maps are read and written
// 16 bytes at a time for every number of channels.
//
// A block of 256 threads computes a tile of 16×16 pixels and 32 channels. Its input, with a border of one pixel, is
// upsampled from the codes, or copied, to shared memory, 32 channels at a time. A thread has 8 pixels of a row and 4
// channels. For each row of the 3×3 kernel and each 4 input channels, it loads 10 pixels and 12 rows of weights, and
// does 384 multiply-adds in fp32.
#pragma once
#include "nearest_code_search.cuh"

namespace var_kernels {
namespace {

constexpr int kMapThreads = 256;
constexpr int kTileSide = 16, kTileChannels = 32;
constexpr int kThreadPixels = 8, kThreadChannels = 4;
constexpr int kPieces = kTileChannels / 4;  // pieces of 16 bytes in a pixel of a tile
constexpr int kBorderedSide = kTileSide + 2;
static_assert(kTileSide * kTileSide / kThreadPixels * kPieces == kMapThreads && kTileChannels == kChunk);

struct GpuMapShape {
  int channels, pitch, height, width;

  __host__ __device__ int pixels() const { return height * width; }
  __host__ __device__ int64_t floats() const { return int64_t(pixels()) * pitch; }
  __host__ __device__ int tiles_across() const { return (width + kTileSide - 1) / kTileSide; }
  __host__ __device__ int tiles() const { return (height + kTileSide - 1) / kTileSide * tiles_across(); }
  __host__ __device__ int channel_tiles() const { return (channels + kTileChannels - 1) / kTileChannels; }
};

// A scale's map of codes. `ratio_y` and `ratio_x` are its sides divided by those of the full map, in fp32.
struct GpuScale {
  int height, width, phi, first_token;
  float ratio_y, ratio_x;

  __host__ __device__ int tokens() const { return height * width; }
};

constexpr int kMostScales = 64;  // in a schedule, which is passed to the kernels as an argument

// The convolutions of all scales: (n, channels, channels, 3, 3) and (n, channels), dense.
struct Phi {
  const float *weight, *bias;
  float ratio;
};

// Where a tile begins.
struct MapTile {
  int y, x, channel;
};
__device__ __forceinline__ MapTile tile_at(const GpuMapShape& shape, int index, int channel_tile) {
  return {index / shape.tiles_across() * kTileSide, index % shape.tiles_across() * kTileSide,
          channel_tile * kTileChannels};
}

// ---- four channels ------------------------------------------------------------------------------------------------

// Loads channels [c, c + 4) of a dense row of `channels`; missing channels are zero. kVectors: rows are aligned pieces.
template <bool kVectors>
__device__ __forceinline__ float4 load_channels(const float* row, int c, int channels) {
  if constexpr (kVectors) {
    return c < channels ? *reinterpret_cast<const float4*>(row + c) : float4{};
  } else {
    float v[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c + i < channels) v[i] = row[c + i];
    return {v[0], v[1], v[2], v[3]};
  }
}

__device__ __forceinline__ void add_scaled(float4& sum, float factor, const float4& v) {
  sum.x = fmaf(factor, v.x, sum.x);
  sum.y = fmaf(factor, v.y, sum.y);
  sum.z = fmaf(factor, v.z, sum.z);
  sum.w = fmaf(factor, v.w, sum.w);
}

__device__ __forceinline__ float4 load_bias(const Phi& phi, int convolution, const GpuMapShape& shape, int c) {
  return load_channels<false>(phi.bias + int64_t(convolution) * shape.channels, c, shape.channels);
}
__device__ __forceinline__ const float* weight_of(const Phi& phi, int convolution, const GpuMapShape& shape) {
  return phi.weight + int64_t(convolution) * shape.channels * shape.channels * 9;
}

// ---- images -------------------------------------------------------------------------------------------------------

// f (B, C, H, W) with any strides, in elements.
struct ImageMaps {
  const float* data;
  int64_t image, channel, row, column;

  __device__ __forceinline__ const float* at(int64_t image_index, int y, int x) const {
    return data + image_index * image + y * row + x * column;
  }
  __device__ __forceinline__ float4 load(int64_t image_index, int y, int x, int c, int channels) const {
    const float* const pixel = at(image_index, y, x);
    float v[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c + i < channels) v[i] = pixel[(c + i) * channel];
    return {v[0], v[1], v[2], v[3]};
  }
};

// Stores channels [c, c + 4) of a pixel of a dense (C, H, W) map.
__device__ __forceinline__ void store_channels(float* out, const GpuMapShape& shape, int pixel, int c,
                                               const float4& v) {
  const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (c + i < shape.channels) out[int64_t(c + i) * shape.pixels() + pixel] = values[i];
}

// A thread's part of an image's work. There are `count` threads for each of `images` images, in a grid of whole blocks.
struct ImagePart {
  int64_t image;
  int index;
  bool exists;
};
__device__ __forceinline__ ImagePart my_part(int count, int images) {
  const int64_t i = int64_t(blockIdx.x) * kMapThreads + threadIdx.x, image = i / count;
  return {image, int(i - image * count), image < images};
}

// ---- bicubic upsampling -------------------------------------------------------------------------------------------

// Where pixel `at` of the full axis lies on an axis of `size` pixels. Four pixels, from `first` on, have a weight in
// it, and it lies `t` after the second of them. This is PyTorch's cubic convolution, A = -0.75 and align_corners =
// False.
struct CubicPosition {
  int first;
  float t;

  __device__ __forceinline__ int index(int tap, int size) const { return min(max(first + tap, 0), size - 1); }
  __device__ __forceinline__ float weight(int tap) const {
    const float x = tap < 2 ? t + float(1 - tap) : float(tap - 1) - t;
    if (tap == 1 || tap == 2) return (1.25f * x - 2.25f) * x * x + 1.0f;
    return ((-0.75f * x + 3.75f) * x - 6.0f) * x + 3.0f;
  }
};

__device__ __forceinline__ CubicPosition cubic_position(int at, int size, float ratio) {
  const float position = ratio * (float(at) + 0.5f) - 0.5f;
  const int below = min(int(floorf(position)), size - 1);
  return {below - 1, fminf(fmaxf(position - float(below), 0.0f), 1.0f)};
}

// Channels [c, c + 4) of pixel (y, x) of a scale's code map at full size. code(q) is the row of code q of that map.
template <bool kVectors, class Code>
__device__ __forceinline__ float4 upsampled(const GpuMapShape& shape, const GpuScale& scale, int y, int x, int c,
                                            const Code& code) {
  if (scale.height == shape.height && scale.width == shape.width)
    return load_channels<kVectors>(code(y * shape.width + x), c, shape.channels);
  const CubicPosition rows = cubic_position(y, scale.height, scale.ratio_y);
  const CubicPosition columns = cubic_position(x, scale.width, scale.ratio_x);
  float4 result = {};
#pragma unroll 1  // loading sixteen codes at once would take the registers of a second block
  for (int i = 0; i < 4; ++i) {
    const int row = rows.index(i, scale.height) * scale.width;
    float4 line = {};
#pragma unroll
    for (int j = 0; j < 4; ++j)
      add_scaled(line, columns.weight(j),
                 load_channels<kVectors>(code(row + columns.index(j, scale.width)), c, shape.channels));
    add_scaled(result, rows.weight(i), line);
  }
  return result;
}

// ---- a tile's input -----------------------------------------------------------------------------------------------

// Writes rows of pixels, (kBorderedSide, kTileChannels) each, from pixel (y, x) on. It calls pixel(y, x, c) for the
// pixels that exist.
template <class Pixel>
__device__ __forceinline__ void fill_pixels(float* rows, int count, int across, const GpuMapShape& shape, int y, int x,
                                            int channel, const Pixel& pixel) {
  for (int i = int(threadIdx.x); i < count * across * kPieces; i += kMapThreads) {
    const int place = i / kPieces, row = y + place / across, column = x + place % across;
    const int c = channel + i % kPieces * 4;
    const bool exists = row >= 0 && row < shape.height && column >= 0 && column < shape.width && c < shape.channels;
    const float4 value = exists ? pixel(row, column, c) : float4{};
    *reinterpret_cast<float4*>(rows + place * kTileChannels + i % kPieces * 4) = value;
  }
}

__device__ __forceinline__ float4 load_pixel(const float* map, const GpuMapShape& shape, int y, int x, int c) {
  return *reinterpret_cast<const float4*>(map + int64_t(y * shape.width + x) * shape.pitch + c);
}

// ---- the convolution of a tile ------------------------------------------------------------------------------------

constexpr int kStepInputs = 4;  // input channels whose weights are in shared memory at a time
constexpr int kStepWeights = kStepInputs * 9 * kTileChannels;
// The pitch of the weights of one input channel and tap in shared memory. With a pitch of 32, 36 of them would be
// stored to one bank.
constexpr int kWeightPitch = kTileChannels + 4;

// Two blocks of this size fit in 100 KiB, the least that a multiprocessor has. With the weights of two steps they would
// not fit.
struct ConvolutionMemory {
  float pixels[kBorderedSide * kBorderedSide * kTileChannels];
  float weights[kStepInputs * 9 * kWeightPitch];
};

// The weights of a step, in flight from memory. kTransposed: the weights that turn the gradient of the output into that
// of the input.
template <bool kTransposed>
struct StepWeights {
  static constexpr int kCount = (kStepWeights + kMapThreads - 1) / kMapThreads;
  float values[kCount];

  __device__ __forceinline__ void load(const float* weight, int channels, int input, int output) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int index = int(threadIdx.x) + n * kMapThreads, rest = index % (kStepInputs * 9);
      const int i = input + rest / 9, o = output + index / (kStepInputs * 9), tap = rest % 9;
      values[n] = index < kStepWeights && i < channels && o < channels
                      ? kTransposed ? weight[(i * channels + o) * 9 + 8 - tap] : weight[(o * channels + i) * 9 + tap]
                      : 0.0f;
    }
  }
  __device__ __forceinline__ void store(float* target) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int index = int(threadIdx.x) + n * kMapThreads;
      if (index < kStepWeights)
        target[index % (kStepInputs * 9) * kWeightPitch + index / (kStepInputs * 9)] = values[n];
    }
  }
};

// A thread has 8 pixels of a row of a tile, and 4 channels.
__device__ __forceinline__ int thread_row() { return int(threadIdx.x) / kPieces / 2; }
__device__ __forceinline__ int thread_column() { return int(threadIdx.x) / kPieces % 2 * kThreadPixels; }
__device__ __forceinline__ int thread_channel() { return int(threadIdx.x) % kPieces * kThreadChannels; }

struct ConvolvedPixels {
  float sums[kThreadPixels][kThreadChannels];
  const float* middle;  // the thread's first pixel in shared memory, which is that of the map itself

  // (1 - ratio) · map + ratio · (sums + bias). This is phi; with transposed weights and without bias it is its adjoint.
  __device__ __forceinline__ float4 mixed(int pixel, float ratio, const float4& bias) const {
    const float4 same = *reinterpret_cast<const float4*>(middle + pixel * kTileChannels);
    const float keep = 1.0f - ratio;
    return {keep * same.x + ratio * (sums[pixel][0] + bias.x), keep * same.y + ratio * (sums[pixel][1] + bias.y),
            keep * same.z + ratio * (sums[pixel][2] + bias.z), keep * same.w + ratio * (sums[pixel][3] + bias.w)};
  }
};

// One step: four input channels, from channel `input` of the pixels in shared memory on.
__device__ __forceinline__ void convolve_step(float (&sums)[kThreadPixels][kThreadChannels], const float* pixels,
                                              const float* weights) {
  const float* const first = pixels + (thread_row() * kBorderedSide + thread_column()) * kTileChannels;
#pragma unroll 1  // unrolled, the pixels of two rows would be in registers at once
  for (int ky = 0; ky < 3; ++ky) {
    float v[kThreadPixels + 2][kStepInputs];
#pragma unroll
    for (int p = 0; p < kThreadPixels + 2; ++p) {
      const float4 four = *reinterpret_cast<const float4*>(first + (ky * kBorderedSide + p) * kTileChannels);
      v[p][0] = four.x, v[p][1] = four.y, v[p][2] = four.z, v[p][3] = four.w;
    }
#pragma unroll
    for (int kx = 0; kx < 3; ++kx)
#pragma unroll
      for (int i = 0; i < kStepInputs; ++i) {
        const float4 w = *reinterpret_cast<const float4*>(weights + (i * 9 + ky * 3 + kx) * kWeightPitch +
                                                          thread_channel());
#pragma unroll
        for (int p = 0; p < kThreadPixels; ++p) {
          sums[p][0] = fmaf(v[p + kx][i], w.x, sums[p][0]);
          sums[p][1] = fmaf(v[p + kx][i], w.y, sums[p][1]);
          sums[p][2] = fmaf(v[p + kx][i], w.z, sums[p][2]);
          sums[p][3] = fmaf(v[p + kx][i], w.w, sums[p][3]);
        }
      }
  }
}

// A thread's part of the convolution of a tile. `weight` is (channels, channels, 3, 3). The channels of the tile itself
// come last, so that they are in `memory` at the end. A barrier comes before the first write to `memory`; the caller
// needs another barrier before `memory` is used for something else. kAhead: the weights of the next step are loaded
// before a step is computed. This hides their latency if the multiprocessor has no other block that would, and it takes
// registers that two blocks do not have.
template <bool kTransposed, bool kAhead, class Pixel>
__device__ __forceinline__ void convolve_tile(ConvolvedPixels& out, ConvolutionMemory& memory, const GpuMapShape& shape,
                                              const MapTile& tile, const float* weight, const Pixel& pixel) {
#pragma unroll
  for (int p = 0; p < kThreadPixels; ++p)
#pragma unroll
    for (int o = 0; o < kThreadChannels; ++o) out.sums[p][o] = 0.0f;
  const int parts = shape.channel_tiles();
  for (int n = 1; n <= parts; ++n) {
    const int input = (tile.channel / kTileChannels + n) % parts * kTileChannels;
    const int end = min(kTileChannels, shape.channels - input);
    StepWeights<kTransposed> step;
    step.load(weight, shape.channels, input, tile.channel);
    __syncthreads();
    fill_pixels(memory.pixels, kBorderedSide, kBorderedSide, shape, tile.y - 1, tile.x - 1, input, pixel);
    for (int i = 0; i < end; i += kStepInputs) {
      if (i > 0) __syncthreads();  // the weights of the previous step are no longer needed
      step.store(memory.weights);
      __syncthreads();
      if (kAhead) step.load(weight, shape.channels, input + i + kStepInputs, tile.channel);
      convolve_step(out.sums, memory.pixels + i, memory.weights);
      if (!kAhead) step.load(weight, shape.channels, input + i + kStepInputs, tile.channel);
    }
  }
  out.middle =
      memory.pixels + ((thread_row() + 1) * kBorderedSide + thread_column() + 1) * kTileChannels + thread_channel();
}

// Calls f(pixel of the thread, index in the map) for those of a thread's pixels that exist, if its channels exist.
template <class F>
__device__ __forceinline__ void for_own_pixels(const GpuMapShape& shape, const MapTile& tile, const F& f) {
  const int y = tile.y + thread_row(), x = tile.x + thread_column();
  if (y >= shape.height || tile.channel + thread_channel() >= shape.channels) return;
#pragma unroll
  for (int p = 0; p < kThreadPixels; ++p)
    if (x + p < shape.width) f(p, y * shape.width + x + p);
}

// ---- area pooling -------------------------------------------------------------------------------------------------

// Channels [c, c + 4) of a token, which are the mean over its window of the full map. Rows are `pitch` apart.
__device__ __forceinline__ float4 pooled(const GpuMapShape& shape, const float* map, int height, int width, int token,
                                         int c) {
  const int i = token / width, j = token % width;
  const int y0 = i * shape.height / height, y1 = ((i + 1) * shape.height + height - 1) / height;
  const int x0 = j * shape.width / width, x1 = ((j + 1) * shape.width + width - 1) / width;
  float4 sum = {};
  for (int y = y0; y < y1; ++y)
    for (int x = x0; x < x1; ++x) {
      const float4 v = load_pixel(map, shape, y, x, c);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
  const float count = float((y1 - y0) * (x1 - x0));
  return {sum.x / count, sum.y / count, sum.z / count, sum.w / count};
}

// The sum over a block of 256 threads; only thread 0 gets it. A barrier must follow before `exchange` is used again.
__device__ __forceinline__ float block_sum(float v, float (&exchange)[kMapThreads / 32]) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) exchange[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x == 0)
#pragma unroll
    for (int warp = 0; warp < kMapThreads / 32; ++warp) sum += exchange[warp];
  return sum;
}

}  // namespace
}  // namespace var_kernels
