// Functions that the two C++ entries of multi_scale_quantize share: the schedule of maps with its bicubic weights,
// sizes and memory.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "../multi_scale_quantize_checks.h"
#include "dispatch.h"
#include "multi_scale_quantize.h"
#include "nearest_code.h"

namespace var_kernels {

VAR_DECLARE_ISA_TABLES(QuantizeForwardTable, quantize_forward)
VAR_DECLARE_ISA_TABLES(QuantizeBackwardTable, quantize_backward)
VAR_DECLARE_ISA_TABLES(NearestCodeTable, nearest_code_table)

namespace multi_scale {

// The weights of PyTorch's cubic convolution (A = -0.75, align_corners = False) in PyTorch's fp32 arithmetic. They are
// bit-equal to PyTorch's if this file is compiled without fused multiply-add.
inline std::vector<CubicTaps> cubic_taps(int64_t from, int64_t to) {
  constexpr float a = -0.75f;
  const auto near = [](float x) { return ((a + 2) * x - (a + 3)) * x * x + 1; };
  const auto far = [](float x) { return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a; };
  const float scale = float(from) / float(to);
  std::vector<CubicTaps> taps(to);
  for (int64_t i = 0; i < to; ++i) {
    const float position = scale * (float(i) + 0.5f) - 0.5f;
    const int64_t below = std::min<int64_t>(int64_t(std::floor(position)), from - 1);
    const float t = std::clamp(position - float(below), 0.0f, 1.0f);
    for (int64_t j = 0; j < 4; ++j) taps[i].index[j] = int32_t(std::clamp<int64_t>(below - 1 + j, 0, from - 1));
    const float weights[] = {far(t + 1), near(t), near(1 - t), far(2 - t)};
    std::copy(weights, weights + 4, taps[i].weight);
  }
  return taps;
}

struct Scale {
  int64_t height, width, offset;  // tokens [offset, offset + height * width) of an image
  std::vector<CubicTaps> vertical, horizontal;  // empty if the map has the full size

  int64_t tokens() const { return height * width; }

  CodeMap codes(const float* rows, int64_t row_stride, const int64_t* tokens) const {
    return {rows, row_stride, tokens, height, width, vertical.empty() ? nullptr : vertical.data(),
            horizontal.empty() ? nullptr : horizontal.data()};
  }
};

inline Scale make_scale(const MapShape& shape, int64_t height, int64_t width, int64_t offset) {
  if (height == shape.height && width == shape.width) return {height, width, offset, {}, {}};
  return {height, width, offset, cubic_taps(height, shape.height), cubic_taps(width, shape.width)};
}

struct Schedule {
  std::vector<Scale> scales;
  int64_t tokens = 0, largest = 0;  // the number of tokens of all scales, and of the largest map
};

inline Schedule make_schedule(const MapShape& shape, const Sizes& heights, const Sizes& widths) {
  check_sizes(heights, widths, shape.height, shape.width);
  Schedule schedule;
  for (size_t k = 0; k < heights.size(); ++k) {
    schedule.scales.push_back(make_scale(shape, heights[k], widths[k], schedule.tokens));
    const int64_t tokens = heights[k] * widths[k];
    schedule.tokens += tokens;
    schedule.largest = std::max(schedule.largest, tokens);
  }
  return schedule;
}

inline MapShape map_shape(const Tensor& f, const char* argument) {
  check_float(f, argument, 4);
  const int64_t channels = f.size(1), width = quantize_forward().vector_width;
  VAR_CHECK(channels > 0 && f.size(2) > 0 && f.size(3) > 0, argument, "channels, height and width", "none");
  return {channels, round_up(channels, width), f.size(2), f.size(3)};
}

// The floats that pack_phi writes: nine matrices, the bias, the weights of the identity.
inline int64_t phi_floats(const MapShape& shape) { return (9 * shape.padded + 2) * shape.padded; }

inline int64_t map_floats(const MapShape& shape) { return shape.height * shape.width * shape.padded; }

inline Image image_of(const Tensor& f, int64_t index) {
  return {f.const_data_ptr<float>() + index * f.stride(0), f.stride(1), f.stride(2), f.stride(3)};
}

// Memory with unspecified contents that the threads share. (thread_scratch is for the memory of single tasks.)
inline Tensor workspace(int64_t floats) { return empty_cpu({floats}, ScalarType::Float); }

inline Tensor empty_map(const Tensor& like) {
  return empty_cpu({like.size(0), like.size(1), like.size(2), like.size(3)}, ScalarType::Float);
}

}  // namespace multi_scale
}  // namespace var_kernels
