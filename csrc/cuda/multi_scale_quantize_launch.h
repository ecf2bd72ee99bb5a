// What the entry functions of multi_scale_quantize on CUDA devices share: tensors as kernels see them, schedules,
// grids.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../multi_scale_quantize_checks.h"
#include "launch.h"
#include "multi_scale_quantize_map.cuh"

namespace var_kernels {
namespace {

using namespace multi_scale;

// A grid of `x` by `y` blocks.
inline LaunchShape map_grid(int64_t x, int64_t y = 1, size_t shared_bytes = 0) {
  VAR_CHECK(x <= std::numeric_limits<int>::max(), "f", "less than 2^31 tiles in all images", x);
  return {dim3(unsigned(x), unsigned(y)), dim3(kMapThreads), shared_bytes};
}
inline LaunchShape tile_grid(const GpuMapShape& shape, int64_t maps) {
  return map_grid(maps * shape.tiles(), shape.channel_tiles(), sizeof(ConvolutionMemory));
}
inline LaunchShape part_grid(int64_t parts, int64_t images) { return map_grid(ceil_div(parts * images, kMapThreads)); }

inline GpuMapShape map_shape(const char* name, const Tensor& f) {
  check_float(f, name, 4);
  const int64_t channels = f.size(1), height = f.size(2), width = f.size(3);
  VAR_CHECK(channels > 0 && height > 0 && width > 0, name, "channels, height and width", "none");
  VAR_CHECK(channels <= 1 << 13, name, "at most 8192 channels", channels);  // because 32-bit numbers count the weights
  VAR_CHECK(f.size(0) < kMostRows && ceil_div(channels, 4) * 4 * height * width < kMostRows, name,
            "less than 2^30 elements in a map", channels * height * width);
  return {int(channels), int(ceil_div(channels, 4) * 4), int(height), int(width)};
}

inline ImageMaps image_maps(const Tensor& f) {
  return {f.const_data_ptr<float>(), f.stride(0), f.stride(1), f.stride(2), f.stride(3)};
}

inline GpuScale make_scale(const GpuMapShape& shape, int64_t height, int64_t width, int64_t phi, int64_t first_token) {
  return {int(height), int(width), int(phi), int(first_token), float(height) / float(shape.height),
          float(width) / float(shape.width)};
}

struct GpuSchedule {
  std::vector<GpuScale> scales;
  int64_t length = 0, largest = 0;  // tokens of all scales, and of the largest scale
};

inline GpuSchedule make_schedule(const GpuMapShape& shape, const Sizes& heights, const Sizes& widths,
                                 const Sizes& phi_index, int64_t convolutions) {
  check_sizes(heights, widths, shape.height, shape.width);
  check_phi_index(phi_index, heights.size(), convolutions);
  VAR_CHECK(heights.size() <= size_t(kMostScales), "heights, widths", "at most 64 scales", heights.size());
  GpuSchedule schedule;
  for (size_t k = 0; k < heights.size(); ++k) {
    schedule.scales.push_back(make_scale(shape, heights[k], widths[k], phi_index[k], schedule.length));
    schedule.length += heights[k] * widths[k];
    schedule.largest = std::max(schedule.largest, heights[k] * widths[k]);
    VAR_CHECK(schedule.length < kMostRows, "heights, widths", "less than 2^30 tokens", schedule.length);
  }
  return schedule;
}

template <class F>
void with_vectors(bool fit, const F& f) {
  fit ? f(std::true_type()) : f(std::false_type());
}

inline Tensor empty_like_maps(const OnDevice& device, const Tensor& f) {
  return device.empty({f.size(0), f.size(1), f.size(2), f.size(3)}, ScalarType::Float);
}

}  // namespace
}  // namespace var_kernels
