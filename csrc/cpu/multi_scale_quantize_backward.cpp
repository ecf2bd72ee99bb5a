// The C++ entry of the backward of multi_scale_quantize on CPUs.
//
// The tokens are known, so the scales no longer wait for one another. The work is first h_k of every image and scale,
// then the suffix sums over the scales, then the gradients of every scale. Weight gradients go to one partial sum for
// each scale and each image (slot) of a group, whatever the number of threads, and the partial sums are added in order.
#include <tuple>

#include "multi_scale_quantize_plan.h"

namespace var_kernels {
namespace {

using namespace multi_scale;

// How many images are processed together. The backward keeps their maps h_k, one per scale, in memory.
constexpr int64_t kSlots = 8;

struct Backward {
  const QuantizeForwardTable& forward = quantize_forward();
  const QuantizeBackwardTable& table = quantize_backward();
  const Tensor& f;
  MapShape shape;
  const Schedule& schedule;
  const float* codebook;  // (codes, channels)
  int64_t codes;
  const int64_t* tokens;  // (batch, schedule.tokens)
  const float* packed_phi;
  const float* packed_adjoint;
  const Sizes& phi_index;
  const float* factors;  // (batch, scales), 2 * derrors
  float* maps;           // (slots, scales), bordered
  float* dcodes;         // (slots, schedule.tokens, padded)
  float* partials;       // (scales, slots): dweight (3, 3, channels, padded) and dbias (padded)

  int64_t scales() const { return schedule.scales.size(); }
  int64_t weight_floats() const { return 9 * shape.channels * shape.padded; }
  int64_t partial_floats() const { return weight_floats() + shape.padded; }
  int64_t bordered_row() const { return (shape.width + 2) * shape.padded; }
  int64_t bordered_floats() const { return (shape.height + 2) * bordered_row(); }
  int64_t work(int64_t count) const { return count * scales() * map_floats(shape) * shape.padded * 9; }

  CodeMap codes_of(int64_t image, int64_t k) const {
    const Scale& scale = schedule.scales[k];
    return scale.codes(codebook, shape.channels, tokens + image * schedule.tokens + scale.offset);
  }

  void recompute(int64_t first, int64_t count) const {
    const int64_t scratch = forward.phi_scratch_floats(shape, shape.height, schedule.largest);
    parallel_tasks(count * scales(), work(count), [&](int64_t task) {
      const int64_t k = task % scales();
      float* map = maps + task * bordered_floats();
      std::fill_n(map, bordered_row() + shape.padded, 0.0f);
      for (int64_t y = 1; y <= shape.height; ++y)
        std::fill_n(map + (y + 1) * bordered_row() - shape.padded, 2 * shape.padded, 0.0f);
      std::fill_n(map + (shape.height + 1) * bordered_row(), bordered_row(), 0.0f);
      forward.phi_rows(shape, codes_of(first + task / scales(), k), packed_phi + phi_index[k] * phi_floats(shape), 0,
                       shape.height, thread_scratch(scratch), map + bordered_row() + shape.padded, bordered_row());
    });
  }

  void suffix_sums(int64_t first, int64_t count, float* df) const {
    parallel_tasks(count * shape.height, count * scales() * map_floats(shape) * 4, [&](int64_t task) {
      const int64_t slot = task / shape.height, image = first + slot;
      table.suffix_sums(shape, image_of(f, image), task % shape.height, scales(), factors + image * scales(),
                        maps + slot * scales() * bordered_floats(), thread_scratch(shape.width * shape.padded),
                        df + image * shape.channels * shape.height * shape.width);
    });
  }

  void phi_backward(int64_t first, int64_t count) const {
    const int64_t scratch = table.scratch_floats(shape, schedule.largest);
    parallel_tasks(count * scales(), 2 * work(count), [&](int64_t task) {
      const int64_t slot = task / scales(), k = task % scales();
      float* dweight = partials + (k * kSlots + slot) * partial_floats();
      table.phi_backward(shape, codes_of(first + slot, k), packed_adjoint + phi_index[k] * phi_floats(shape),
                         maps + task * bordered_floats(), thread_scratch(scratch), first > 0, dweight,
                         dweight + weight_floats(),
                         dcodes + (slot * schedule.tokens + schedule.scales[k].offset) * shape.padded);
    });
  }

  // The codes, not the tokens, are divided among the threads, so every code receives its sum in the order of the
  // tokens.
  void scatter(int64_t first, int64_t count, float* dcodebook) const {
    const int64_t ranges = std::min<int64_t>(codes, torch::stable::get_num_threads());
    parallel_tasks(ranges, count * schedule.tokens * shape.padded, [&](int64_t range) {
      table.scatter_add(shape, tokens + first * schedule.tokens, count * schedule.tokens, dcodes,
                        codes * range / ranges, codes * (range + 1) / ranges, dcodebook);
    });
  }

  // Adds up the partial sums (in, out = padded) of one convolution and tap and stores them in (out, in, 3, 3); tap 9
  // stands for the bias.
  void reduce(int64_t slots, int64_t convolution, int64_t tap, float ratio, float* dweight, float* dbias) const {
    const int64_t floats = tap < 9 ? shape.channels * shape.padded : shape.padded;
    float* sum = thread_scratch(floats);
    std::fill_n(sum, floats, 0.0f);
    for (int64_t k = 0; k < scales(); ++k)
      for (int64_t slot = 0; phi_index[k] == convolution && slot < slots; ++slot)
        table.add(partials + (k * kSlots + slot) * partial_floats() + tap * shape.channels * shape.padded, floats, sum);
    if (tap == 9) {
      for (int64_t c = 0; c < shape.channels; ++c) dbias[convolution * shape.channels + c] = ratio * sum[c];
      return;
    }
    float* out = dweight + convolution * shape.channels * shape.channels * 9 + tap;
    for (int64_t o = 0; o < shape.channels; ++o)
      for (int64_t i = 0; i < shape.channels; ++i)
        out[(o * shape.channels + i) * 9] = ratio * sum[i * shape.padded + o];
  }
};

std::vector<float> gradient_factors(const Tensor& derrors) {
  const float* data = derrors.const_data_ptr<float>();
  std::vector<float> factors;
  factors.reserve(derrors.size(0) * derrors.size(1));
  for (int64_t b = 0; b < derrors.size(0); ++b)
    for (int64_t k = 0; k < derrors.size(1); ++k)
      factors.push_back(2 * data[b * derrors.stride(0) + k * derrors.stride(1)]);
  return factors;
}

void check_tokens(const Tensor& tokens, int64_t batch, int64_t length, int64_t codes) {
  VAR_CHECK(tokens.scalar_type() == ScalarType::Long, "tokens", "int64",
            torch::headeronly::toString(tokens.scalar_type()));
  VAR_CHECK(tokens.dim() == 2 && tokens.size(0) == batch && tokens.size(1) == length, "tokens",
            shape_text({batch, length}), shape_text(tokens));
  const int64_t* data = tokens.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < batch * length; ++i)
    VAR_CHECK(data[i] >= 0 && data[i] < codes, "tokens", "indices of the codebook", data[i]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> multi_scale_quantize_backward(
    const Tensor& f, const Tensor& codebook_in, const Tensor& phi_weight_in, const Tensor& phi_bias,
    const Tensor& tokens_in, const Tensor& derrors, Sizes heights, Sizes widths, Sizes phi_index, double phi_ratio) {
  const MapShape shape = map_shape(f, "f");
  const Schedule schedule = make_schedule(shape, heights, widths);
  const int64_t batch = f.size(0), scales = schedule.scales.size(), channels = shape.channels;
  check_codebook(codebook_in, channels);
  check_phi(phi_weight_in, phi_bias, channels);
  const int64_t convolutions = phi_weight_in.size(0), codes = codebook_in.size(0);
  check_phi_index(phi_index, scales, convolutions);
  check_float(derrors, "derrors", 2);
  VAR_CHECK(derrors.size(0) == batch && derrors.size(1) == scales, "derrors", shape_text({batch, scales}),
            shape_text(derrors));
  const Tensor tokens = dense(tokens_in), codebook = dense(codebook_in);
  const Tensor phi_weight = dense(phi_weight_in), bias = dense(phi_bias);
  check_tokens(tokens, batch, schedule.tokens, codes);
  Tensor df = empty_map(f);
  Tensor dcodebook = empty_cpu({codes, channels}, ScalarType::Float);
  Tensor dweight = empty_cpu({convolutions, channels, channels, 3, 3}, ScalarType::Float);
  Tensor dbias = empty_cpu({convolutions, channels}, ScalarType::Float);
  std::fill_n(dcodebook.mutable_data_ptr<float>(), codes * channels, 0.0f);

  const int64_t slots = std::min(batch, kSlots);
  const std::vector<float> factors = gradient_factors(derrors);
  const Tensor packed = workspace(2 * convolutions * phi_floats(shape));
  float* phi_data = packed.mutable_data_ptr<float>();
  Backward backward{.f = f, .shape = shape, .schedule = schedule, .codebook = codebook.const_data_ptr<float>(),
                    .codes = codes, .tokens = tokens.const_data_ptr<int64_t>(), .packed_phi = phi_data,
                    .packed_adjoint = phi_data + convolutions * phi_floats(shape), .phi_index = phi_index,
                    .factors = factors.data(), .maps = nullptr, .dcodes = nullptr, .partials = nullptr};
  const Tensor maps = workspace(slots * scales * backward.bordered_floats());
  const Tensor dcodes = workspace(slots * schedule.tokens * shape.padded);
  const Tensor partials = workspace(scales * kSlots * backward.partial_floats());
  backward.maps = maps.mutable_data_ptr<float>();
  backward.dcodes = dcodes.mutable_data_ptr<float>();
  backward.partials = partials.mutable_data_ptr<float>();

  parallel_tasks(2 * convolutions, 2 * phi_weight.numel(), [&](int64_t task) {
    const int64_t i = task % convolutions;
    backward.forward.pack_phi(phi_weight.const_data_ptr<float>() + i * channels * channels * 9,
                              bias.const_data_ptr<float>() + i * channels, channels, float(phi_ratio),
                              task >= convolutions, phi_data + task * phi_floats(shape));
  });
  for (int64_t first = 0; first < batch; first += kSlots) {
    const int64_t count = std::min(kSlots, batch - first);
    backward.recompute(first, count);
    backward.suffix_sums(first, count, df.mutable_data_ptr<float>());
    backward.phi_backward(first, count);
    backward.scatter(first, count, dcodebook.mutable_data_ptr<float>());
  }
  parallel_tasks(10 * convolutions, scales * slots * backward.partial_floats(), [&](int64_t task) {
    backward.reduce(slots, task / 10, task % 10, float(phi_ratio), dweight.mutable_data_ptr<float>(),
                    dbias.mutable_data_ptr<float>());
  });
  return {df, dcodebook, dweight, dbias};
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) {
  m.impl("_multi_scale_quantize_backward", TORCH_BOX(&var_kernels::multi_scale_quantize_backward));
}
