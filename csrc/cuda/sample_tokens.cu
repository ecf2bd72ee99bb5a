// The launcher and the entry function of sample_tokens on CUDA devices.
#include "sample_tokens.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../sample_tokens_checks.h"
#include "launch.h"

namespace var_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
void run(const OnDevice& device, const SampleTokens& a) {
  // Each random counter of a thread serves four tokens.
  const bool small = a.vocab <= 1024, medium = a.vocab <= 4096;
  const auto kernel = small    ? sample_tokens_kernel<T, 1, 256>
                      : medium ? sample_tokens_kernel<T, 4, 256>
                               : sample_tokens_kernel<T, 8, 512>;
  const LaunchShape shape = {dim3(unsigned(a.batch * a.length)), dim3(medium ? 256 : 512)};
  launch(device, "sample_tokens", kernel, shape, a);
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

Tensor sample_tokens(const Tensor& conditional_in, const std::optional<Tensor>& unconditional_in, double guidance,
                     int64_t top_k, double top_p, const std::optional<Tensor>& noise_in,
                     const std::optional<Tensor>& seeds_in, int64_t offset) {
  const OnDevice device(conditional_in);
  const Tensor conditional = dense_last(conditional_in);
  const std::optional<Tensor> unconditional =
      unconditional_in ? std::optional(dense_last(*unconditional_in)) : std::nullopt;
  const std::optional<Tensor> noise = contiguous(noise_in), seeds = contiguous(seeds_in);
  SampleTokens arguments =
      check_sample_tokens(conditional, unconditional, guidance, top_k, top_p, noise, seeds, offset);
  constexpr int64_t kMostTokens = 4 * 8 * 512;
  VAR_CHECK(arguments.vocab <= kMostTokens, "conditional", "at most 16384 tokens to choose from on a GPU",
            arguments.vocab);
  VAR_CHECK(arguments.batch * arguments.length <= INT32_MAX, "conditional", "fewer rows",
            arguments.batch * arguments.length);
  Tensor tokens = device.empty({arguments.batch, arguments.length}, ScalarType::Long);
  if (tokens.numel() == 0) return tokens;
  arguments.tokens = tokens.mutable_data_ptr<int64_t>();
  with_dtype(conditional, [&](auto zero) { run<decltype(zero)>(device, arguments); });
  return tokens;
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) { m.impl("_sample_tokens", TORCH_BOX(&var_kernels::sample_tokens)); }
