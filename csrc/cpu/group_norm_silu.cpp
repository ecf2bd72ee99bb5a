// The C++ entry of group_norm_silu on CPUs: checks, work over threads, and the statistics of the groups.
#include "group_norm_silu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>

#include "../checks.h"
#include "dispatch.h"

namespace var_kernels {

VAR_DECLARE_ISA_TABLES(GroupNormTable, group_norm_table)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWorkPerElement = 8;

void check_affine(const char* name, const Tensor& tensor, int64_t channels) {
  VAR_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.size(0) == channels &&
                tensor.is_contiguous(),
            name, "a dense float32 vector, one for each channel", tensor.numel(), " elements");
}

// Turns the moments of the chunks of one image into the factor and the addend of each channel.
void fold(const float* mean, const float* squares, int64_t chunks, int64_t pixels, int64_t channels, int64_t groups,
          double eps, const float* weight, const float* bias, float* factor, float* addend) {
  const int64_t width = channels / groups;
  const auto pixels_of = [&](int64_t chunk) {
    return double(std::min(kGroupNormPixels, pixels - chunk * kGroupNormPixels));
  };
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t begin = group * width, end = begin + width;
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t c = begin; c < end; ++c) sum += pixels_of(chunk) * mean[chunk * channels + c];
    const double centre = sum / double(pixels * width);
    double left = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t c = begin; c < end; ++c) {
        const double distance = mean[chunk * channels + c] - centre;
        left += squares[chunk * channels + c] + pixels_of(chunk) * distance * distance;
      }
    const double rstd = 1 / std::sqrt(left / double(pixels * width) + eps);
    for (int64_t c = begin; c < end; ++c) {
      factor[c] = float(rstd * weight[c]);
      addend[c] = float(bias[c] - centre * rstd * weight[c]);
    }
  }
}

// x is (B, P, C), dense: images with P pixels and their channels last. y has the shape of x, and may be x itself.
void group_norm_silu(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, double eps, bool silu,
                     const Tensor& y) {
  const ScalarType dtype = x.scalar_type();
  const int index = dtype_index("x", x);
  VAR_CHECK(x.dim() == 3 && x.is_contiguous(), "x", "a dense tensor of shape (B, P, C)", x.dim(), " dimensions");
  const int64_t batch = x.size(0), pixels = x.size(1), channels = x.size(2);
  VAR_CHECK(groups > 0 && channels % groups == 0, "groups", "a divisor of the channels", groups);
  VAR_CHECK(y.scalar_type() == dtype && y.dim() == 3 && y.is_contiguous() && y.size(0) == batch &&
                y.size(1) == pixels && y.size(2) == channels,
            "y", "a dense tensor of the shape and dtype of x", y.numel(), " elements");
  check_affine("weight", weight, channels);
  check_affine("bias", bias, channels);
  if (x.numel() == 0) return;

  const GroupNormTable& table = group_norm_table();
  const int64_t chunks = ceil_div(pixels, kGroupNormPixels), rows = batch * chunks;
  const int64_t work = x.numel() * kWorkPerElement, row_bytes = channels * x.element_size();
  const char* in = static_cast<const char*>(x.const_data_ptr());
  char* out = static_cast<char*>(y.mutable_data_ptr());
  Tensor statistics = empty_cpu({2, rows, channels}, ScalarType::Float), affine = empty_cpu({2, batch, channels},
                                                                                           ScalarType::Float);
  float *mean = statistics.mutable_data_ptr<float>(), *squares = mean + rows * channels;
  float *factor = affine.mutable_data_ptr<float>(), *addend = factor + batch * channels;

  const auto for_each_chunk = [&](const auto& f) {
    parallel_tasks(rows, work, [&](int64_t row) {
      const int64_t image = row / chunks, begin = row % chunks * kGroupNormPixels;
      f(row, image, (image * pixels + begin) * row_bytes, std::min(kGroupNormPixels, pixels - begin));
    });
  };
  for_each_chunk([&](int64_t row, int64_t, int64_t at, int64_t count) {
    table.moments[index](in + at, count, channels, mean + row * channels, squares + row * channels);
  });
  parallel_tasks(batch, rows * channels * kWorkPerElement, [&](int64_t image) {
    const int64_t at = image * chunks * channels;
    fold(mean + at, squares + at, chunks, pixels, channels, groups, eps, weight.const_data_ptr<float>(),
         bias.const_data_ptr<float>(), factor + image * channels, addend + image * channels);
  });
  const bool stream = stored_past_caches(batch * pixels * row_bytes, row_bytes, out);
  for_each_chunk([&](int64_t, int64_t image, int64_t at, int64_t count) {
    table.apply[index](in + at, count, channels, factor + image * channels, addend + image * channels, silu, stream,
                       out + at);
  });
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) { m.impl("_group_norm_silu", TORCH_BOX(&var_kernels::group_norm_silu)); }
