// The checks of the arguments of multi_scale_quantize, for the entry functions of CPU and CUDA.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "checks.h"

namespace var_kernels::multi_scale {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline void check_float(const Tensor& tensor, const char* argument, int64_t dimensions) {
  VAR_CHECK(tensor.scalar_type() == ScalarType::Float, argument, "float32",
            torch::headeronly::toString(tensor.scalar_type()));
  VAR_CHECK(tensor.dim() == dimensions, argument, dimensions, tensor.dim(), " dimensions");
}

inline void check_phi(const Tensor& weight, const Tensor& bias, int64_t channels) {
  check_float(weight, "phi_weight", 5);
  check_float(bias, "phi_bias", 2);
  VAR_CHECK(weight.size(1) == channels && weight.size(2) == channels && weight.size(3) == 3 && weight.size(4) == 3,
            "phi_weight", shape_text({weight.size(0), channels, channels, 3, 3}), shape_text(weight));
  VAR_CHECK(bias.size(0) == weight.size(0) && bias.size(1) == channels, "phi_bias",
            shape_text({weight.size(0), channels}), shape_text(bias));
}

inline void check_phi_index(const Sizes& phi_index, size_t scales, int64_t convolutions) {
  VAR_CHECK(phi_index.size() == scales, "phi_index", scales, phi_index.size(), " entries");
  for (const int64_t i : phi_index)
    VAR_CHECK(i >= 0 && i < convolutions, "phi_index", "an index of phi_weight", i);
}

// Checks the sizes of the maps of a schedule; the last map must have the full size.
inline void check_sizes(const Sizes& heights, const Sizes& widths, int64_t height, int64_t width) {
  VAR_CHECK(!heights.empty() && heights.size() == widths.size(), "heights, widths", "one entry per scale",
            heights.size(), " and ", widths.size());
  for (size_t k = 0; k < heights.size(); ++k)
    VAR_CHECK(heights[k] > 0 && widths[k] > 0, "heights, widths", "positive sizes", heights[k], " and ", widths[k]);
  VAR_CHECK(heights.back() == height && widths.back() == width, "heights, widths", "the full size as last entry",
            heights.back(), " and ", widths.back());
}

// Checks one step: the codes of a scale, its size, and the size of the next map, which is 0 if there is no next map.
inline void check_step(const Tensor& codes, int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t next_height, int64_t next_width) {
  check_float(codes, "codes", 3);
  VAR_CHECK(height > 0 && width > 0, "height, width", "positive sizes", height, " and ", width);
  VAR_CHECK(next_height >= 0 && next_width >= 0, "next_height, next_width", "sizes", next_height, " and ", next_width);
  VAR_CHECK(codes.size(0) == batch && codes.size(1) == height * width && codes.size(2) == channels, "codes",
            shape_text({batch, height * width, channels}), shape_text(codes));
}

inline void check_codebook(const Tensor& codebook, int64_t channels) {
  check_float(codebook, "codebook", 2);
  VAR_CHECK(codebook.size(0) > 0, "codebook", "at least one code", codebook.size(0));
  VAR_CHECK(codebook.size(1) == channels, "codebook", shape_text({codebook.size(0), channels}), shape_text(codebook));
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace var_kernels::multi_scale
