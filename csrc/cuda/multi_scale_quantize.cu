// The launchers and the entry functions of multi_scale_quantize and next_scale_input on CUDA devices.
#include "multi_scale_quantize.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "multi_scale_quantize_launch.h"
#include "nearest_code_launch.h"

namespace var_kernels {
namespace {

// The shared memory that a block may have on every GPU from compute capability 8.0 on, minus what the kernel declares.
constexpr size_t kMostSharedBytes = (99 << 10) - sizeof(float) * kMapThreads / 32;

// Whether one block per image is less work for the busiest multiprocessor than launches over the whole GPU. It compares
// counts of multiply-adds, with the start of a kernel counted in clocks. These are estimates; no GPU has been measured.
bool resident_is_cheaper(const Quantize& a, const GpuSchedule& schedule, const OnDevice& device) {
  constexpr double kMultiplyAdds = 64, kStart = 4000, kStarts = 4;  // per clock; clocks; per scale
  const GpuMapShape& shape = a.shape;
  const double search = double(schedule.length) * a.codes * shape.channels;
  const double update = double(a.scales) * shape.pixels() * shape.channels * (9.0 * shape.channels + 16);
  const double clocks = (search + update) / kMultiplyAdds, processors = multiprocessors(device);
  return clocks * double(ceil_div(a.images, int64_t(processors))) <
         clocks * a.images / processors + kStart * kStarts * a.scales;
}

void quantize_resident(const OnDevice& device, const Quantize& problem, const GpuSchedule& schedule, bool vectors) {
  ResidentQuantize arguments = {problem, int(schedule.largest), {}};
  static_assert(sizeof arguments <= 4096);
  std::copy(schedule.scales.begin(), schedule.scales.end(), arguments.schedule);
  const LaunchShape shape = map_grid(problem.images, 1, resident_shared_bytes(problem.shape, arguments.largest));
  with_vectors(vectors, [&](auto fit) {
    launch(device, "multi_scale_quantize", quantize_resident_kernel<decltype(fit)::value>, shape, arguments);
  });
}

void quantize_stepwise(const OnDevice& device, Quantize arguments, const GpuSchedule& schedule, bool vectors) {
  const GpuMapShape& shape = arguments.shape;
  const int64_t images = arguments.images, tiles = int64_t(shape.tiles()) * shape.channel_tiles();
  Tensor rest = device.empty({images, shape.floats()}, ScalarType::Float);
  Tensor z = device.empty({images, schedule.largest, shape.channels}, ScalarType::Float);
  Tensor parts = device.empty({images, int64_t(arguments.scales), tiles}, ScalarType::Float);
  float* const errors = arguments.errors;
  arguments.rest = rest.mutable_data_ptr<float>();
  arguments.errors = parts.mutable_data_ptr<float>();
  float* const pooled = z.mutable_data_ptr<float>();
  launch(device, "multi_scale_quantize load", load_maps_kernel, part_grid(shape.pixels() * (shape.pitch / 4), images),
         arguments.f, shape, int(images), arguments.rest);
  for (int k = 0; k < arguments.scales; ++k) {
    const GpuScale& scale = schedule.scales[k];
    launch(device, "multi_scale_quantize pool", pool_kernel,
           part_grid(int64_t(scale.tokens()) * (shape.pitch / 4), images), arguments.rest, shape, int(images),
           scale.height, scale.width, arguments.centre, pooled);
    VAR_CHECK(images * scale.tokens() <= kMostRows, "f", "at most 2^30 tokens of a scale", images * scale.tokens());
    search(device, {{pooled, shape.channels, int(images * scale.tokens()), shape.channels},
                    {arguments.searched, shape.channels, arguments.codes, shape.channels},
                    {arguments.tokens + scale.first_token, scale.tokens(), arguments.length},
                    nullptr, 0, arguments.normalised});
    with_vectors(vectors, [&](auto fit) {
      launch(device, "multi_scale_quantize update", quantize_update_kernel<decltype(fit)::value>,
             tile_grid(shape, images), arguments, scale, k);
    });
  }
  launch(device, "multi_scale_quantize errors", sum_tiles_kernel, part_grid(arguments.scales, images),
         arguments.errors, int(tiles), int(images * arguments.scales), errors);
}

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& f, const Tensor& codebook_in, const Tensor& phi_weight_in,
                                            const Tensor& phi_bias_in, Sizes heights, Sizes widths, Sizes phi_index,
                                            double phi_ratio, bool cosine) {
  const GpuMapShape shape = map_shape("f", f);
  check_codebook(codebook_in, shape.channels);
  check_phi(phi_weight_in, phi_bias_in, shape.channels);
  const GpuSchedule schedule = make_schedule(shape, heights, widths, phi_index, phi_weight_in.size(0));
  VAR_CHECK(codebook_in.size(0) <= kMostRows, "codebook", "at most 2^30 codes", codebook_in.size(0));
  const OnDevice device(f);
  const int64_t images = f.size(0), scales = int64_t(schedule.scales.size());
  const Tensor codebook = dense(codebook_in), phi_weight = dense(phi_weight_in), phi_bias = dense(phi_bias_in);
  Tensor tokens = device.empty({images, schedule.length}, ScalarType::Long);
  Tensor out = empty_like_maps(device, f);
  Tensor errors = device.empty({images, scales}, ScalarType::Float);
  if (images == 0) return {tokens, out, errors};
  Tensor f_hat = device.empty({scales > 1 ? images : 0, shape.floats()}, ScalarType::Float);  // between two scales
  const float* const codes = codebook.const_data_ptr<float>();
  const Matrix rows = {codes, shape.channels, int(codebook.size(0)), shape.channels};
  std::optional<Centred> from_centre;
  if (!cosine) from_centre = centred<float>(device, rows, {nullptr, 0, 0, shape.channels});
  const Tensor searched = cosine ? normalised_codes<float>(device, rows) : from_centre->codes;
  const Quantize arguments = {
      image_maps(f), codes, searched.const_data_ptr<float>(),
      cosine ? nullptr : from_centre->centre.const_data_ptr<float>(),
      {phi_weight.const_data_ptr<float>(), phi_bias.const_data_ptr<float>(), float(phi_ratio)},
      f_hat.mutable_data_ptr<float>(), nullptr, out.mutable_data_ptr<float>(), tokens.mutable_data_ptr<int64_t>(),
      errors.mutable_data_ptr<float>(), shape, rows.rows, int(images), int(schedule.length), int(scales),
      cosine};
  const bool vectors = vectors_fit(rows);
  const bool resident = resident_shared_bytes(shape, int(schedule.largest)) <= kMostSharedBytes &&
                        resident_is_cheaper(arguments, schedule, device);
  resident ? quantize_resident(device, arguments, schedule, vectors)
           : quantize_stepwise(device, arguments, schedule, vectors);
  return {tokens, out, errors};
}

std::tuple<Tensor, Tensor> next_scale_input(const Tensor& f_hat, const Tensor& codes_in, const Tensor& phi_weight_in,
                                            const Tensor& phi_bias_in, int64_t phi_index, int64_t height,
                                            int64_t width, int64_t next_height, int64_t next_width,
                                            double phi_ratio) {
  const GpuMapShape shape = map_shape("f_hat", f_hat);
  const int64_t images = f_hat.size(0), next_tokens = next_height * next_width;
  check_step(codes_in, images, shape.channels, height, width, next_height, next_width);
  check_phi(phi_weight_in, phi_bias_in, shape.channels);
  check_phi_index({phi_index}, 1, phi_weight_in.size(0));
  const OnDevice device(f_hat);
  const Tensor codes = shape.channels == 1 || codes_in.stride(2) == 1 ? codes_in : dense(codes_in);
  const Tensor phi_weight = dense(phi_weight_in), phi_bias = dense(phi_bias_in);
  Tensor out = empty_like_maps(device, f_hat);
  Tensor next = device.empty({images, next_tokens, shape.channels}, ScalarType::Float);
  if (images == 0) return {out, next};
  Tensor map = device.empty({next_tokens > 0 ? images : 0, shape.floats()}, ScalarType::Float);
  const AddScale arguments = {
      image_maps(f_hat), codes.const_data_ptr<float>(), codes.stride(0), codes.stride(1),
      {phi_weight.const_data_ptr<float>(), phi_bias.const_data_ptr<float>(), float(phi_ratio)},
      out.mutable_data_ptr<float>(), next_tokens > 0 ? map.mutable_data_ptr<float>() : nullptr, shape};
  const Matrix rows = {arguments.codes, codes.stride(1), int(height * width), shape.channels};
  const bool vectors = vectors_fit(rows) && codes.stride(0) % 4 == 0;
  with_vectors(vectors, [&](auto fit) {
    launch(device, "next_scale_input", add_scale_kernel<decltype(fit)::value>, tile_grid(shape, images), arguments,
           make_scale(shape, height, width, phi_index, 0));
  });
  if (next_tokens > 0)
    launch(device, "next_scale_input pool", pool_kernel, part_grid(next_tokens * (shape.pitch / 4), images),
           arguments.map, shape, int(images), int(next_height), int(next_width), static_cast<const float*>(nullptr),
           next.mutable_data_ptr<float>());
  return {out, next};
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) {
  m.impl("_multi_scale_quantize", TORCH_BOX(&var_kernels::quantize));
  m.impl("_next_scale_input", TORCH_BOX(&var_kernels::next_scale_input));
}
