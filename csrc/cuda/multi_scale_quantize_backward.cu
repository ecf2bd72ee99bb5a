// The launchers and the entry function of the backward of multi_scale_quantize on CUDA devices.
#include "multi_scale_quantize_backward.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "multi_scale_quantize_launch.h"

namespace var_kernels {
namespace {

// The batch is divided into slices, each with its own sums of the gradients of phi. This number gives enough blocks for
// a GPU, and not too many sums.
constexpr int64_t kMostSlices = 16;

void check_tokens(const Tensor& tokens, int64_t images, int64_t length) {
  VAR_CHECK(tokens.scalar_type() == ScalarType::Long, "tokens", "int64",
            torch::headeronly::toString(tokens.scalar_type()));
  VAR_CHECK(tokens.dim() == 2 && tokens.size(0) == images && tokens.size(1) == length, "tokens",
            shape_text({images, length}), shape_text(tokens));
}

void run(const OnDevice& device, const QuantizeBackward& a) {
  const GpuMapShape& shape = a.shape;
  const LaunchShape tiles = tile_grid(shape, int64_t(a.images) * a.scales);
  const int64_t parts = shape.channel_tiles(), tokens = int64_t(a.images) * a.length, warps = kMapThreads / 32;
  with_vectors(vectors_fit(Matrix{a.codebook, shape.channels, a.codes, shape.channels}), [&](auto fit) {
    constexpr bool kVectors = decltype(fit)::value;
    launch(device, "multi_scale_quantize backward, maps", scale_maps_kernel<kVectors>, tiles, a);
    launch(device, "multi_scale_quantize backward, sums", suffix_sums_kernel,
           part_grid(shape.pixels() * (shape.pitch / 4), a.images), a);
    LaunchShape grid = map_grid(parts * parts, a.scales, sizeof(PhiGradientMemory));
    grid.grid.z = unsigned(a.slices);
    launch(device, "multi_scale_quantize backward, phi", phi_gradients_kernel<kVectors>, grid, a);
  });
  launch(device, "multi_scale_quantize backward, reduction", reduce_phi_kernel,
         map_grid(ceil_div((9 * shape.channels + 1) * int64_t(shape.channels), kMapThreads), a.convolutions), a);
  launch(device, "multi_scale_quantize backward, code maps", code_maps_kernel, tiles, a);
  launch(device, "multi_scale_quantize backward, codes", downsample_kernel,
         map_grid(ceil_div(tokens, warps), parts), a);
  launch(device, "multi_scale_quantize backward, codebook", sum_tokens_kernel,
         map_grid(ceil_div(a.codes, warps), ceil_div(shape.channels, 32)), a);
}

// The tokens are those of the forward. They are not checked, because that would wait for the GPU.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& f, const Tensor& codebook_in,
                                                    const Tensor& phi_weight_in, const Tensor& phi_bias_in,
                                                    const Tensor& tokens_in, const Tensor& derrors, Sizes heights,
                                                    Sizes widths, Sizes phi_index, double phi_ratio) {
  const GpuMapShape shape = map_shape("f", f);
  check_codebook(codebook_in, shape.channels);
  check_phi(phi_weight_in, phi_bias_in, shape.channels);
  const int64_t images = f.size(0), codes = codebook_in.size(0), convolutions = phi_weight_in.size(0);
  const GpuSchedule schedule = make_schedule(shape, heights, widths, phi_index, convolutions);
  const int64_t scales = int64_t(schedule.scales.size()), channels = shape.channels;
  check_float(derrors, "derrors", 2);
  VAR_CHECK(derrors.size(0) == images && derrors.size(1) == scales, "derrors", shape_text({images, scales}),
            shape_text(derrors));
  check_tokens(tokens_in, images, schedule.length);
  const OnDevice device(f);
  const Tensor codebook = dense(codebook_in), phi_weight = dense(phi_weight_in), phi_bias = dense(phi_bias_in);
  const Tensor tokens = dense(tokens_in);
  Tensor df = empty_like_maps(device, f);
  Tensor dcodebook = device.empty({codes, channels}, ScalarType::Float);
  Tensor dweight = device.empty({convolutions, channels, channels, 3, 3}, ScalarType::Float);
  Tensor dbias = device.empty({convolutions, channels}, ScalarType::Float);
  if (images == 0) {
    for (Tensor* gradient : {&dcodebook, &dweight, &dbias}) torch::stable::zero_(*gradient);
    return {df, dcodebook, dweight, dbias};
  }
  const int64_t slice_images = ceil_div(images, kMostSlices), slices = ceil_div(images, slice_images);
  Tensor maps = device.empty({2, images, scales, shape.floats()}, ScalarType::Float);
  Tensor dcodes = device.empty({images * schedule.length, shape.pitch}, ScalarType::Float);
  Tensor partials = device.empty({slices, scales, (9 * channels + 1) * channels}, ScalarType::Float);
  float* const map_data = maps.mutable_data_ptr<float>();
  QuantizeBackward arguments = {
      image_maps(f), codebook.const_data_ptr<float>(), tokens.const_data_ptr<int64_t>(),
      derrors.const_data_ptr<float>(), derrors.stride(0), derrors.stride(1),
      {phi_weight.const_data_ptr<float>(), phi_bias.const_data_ptr<float>(), float(phi_ratio)},
      map_data, map_data + images * scales * shape.floats(), dcodes.mutable_data_ptr<float>(),
      partials.mutable_data_ptr<float>(), df.mutable_data_ptr<float>(), dcodebook.mutable_data_ptr<float>(),
      dweight.mutable_data_ptr<float>(), dbias.mutable_data_ptr<float>(), shape, int(codes), int(images),
      int(schedule.length), int(scales), int(convolutions), int(slice_images), int(slices), {}};
  std::copy(schedule.scales.begin(), schedule.scales.end(), arguments.schedule);
  run(device, arguments);
  return {df, dcodebook, dweight, dbias};
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) { m.impl("_multi_scale_quantize_backward", TORCH_BOX(&var_kernels::backward)); }
