// The checks of the arguments of sample_tokens, for the entry functions of CPU and CUDA.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "sample_tokens.h"

namespace var_kernels {

// The tensor, copied if its last dimension is not dense, as that of every (B, L, V) argument has to be.
inline torch::stable::Tensor dense_last(const torch::stable::Tensor& tensor) {
  return tensor.dim() == 3 && (tensor.size(2) <= 1 || tensor.stride(2) == 1) ? tensor
                                                                             : torch::stable::contiguous(tensor);
}

// The arguments with every pointer except that of the tokens, which the caller allocates. Logits have a dense last
// dimension; noise and seeds are dense.
inline SampleTokens check_sample_tokens(const torch::stable::Tensor& conditional,
                                        const std::optional<torch::stable::Tensor>& unconditional, double guidance,
                                        int64_t top_k, double top_p, const std::optional<torch::stable::Tensor>& noise,
                                        const std::optional<torch::stable::Tensor>& seeds, int64_t offset) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = conditional.scalar_type();
  dtype_index("conditional", conditional);
  VAR_CHECK(conditional.dim() == 3, "conditional", "3 dimensions", conditional.dim());
  const int64_t batch = conditional.size(0), length = conditional.size(1), vocab = conditional.size(2);
  VAR_CHECK(vocab > 0 && vocab <= INT32_MAX, "conditional", "1 … 2^31 - 1 tokens to choose from", vocab);
  const auto like = [&](const char* name, const torch::stable::Tensor& tensor, ScalarType expected) {
    VAR_CHECK(tensor.scalar_type() == expected, name, torch::headeronly::toString(expected),
              torch::headeronly::toString(tensor.scalar_type()));
    VAR_CHECK(tensor.dim() == 3 && tensor.size(0) == batch && tensor.size(1) == length && tensor.size(2) == vocab, name,
              "the shape of conditional", tensor.dim(), " dimensions, ", tensor.numel(), " elements");
  };
  if (unconditional) like("unconditional", *unconditional, dtype);
  VAR_CHECK(noise.has_value() != seeds.has_value(), "noise, seeds", "one of them", noise ? "both" : "neither");
  if (noise) {
    like("noise", *noise, ScalarType::Float);
    VAR_CHECK(noise->is_contiguous(), "noise", "a dense tensor", "a strided one");
  } else {
    VAR_CHECK(seeds->scalar_type() == ScalarType::Long && seeds->dim() == 1 && seeds->size(0) == batch &&
                  seeds->is_contiguous(),
              "seeds", "a dense int64 vector, one for each sample", seeds->numel());
  }
  const auto rows = [](const torch::stable::Tensor& tensor) {
    return Rows{tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
  };
  return {.conditional = rows(conditional), .unconditional = unconditional ? rows(*unconditional) : Rows{},
          .guidance = float(guidance), .top_k = top_k < vocab ? top_k : 0,
          .dropped = top_p > 0 ? float(1 - top_p) : -1.0f, .noise = noise ? noise->const_data_ptr<float>() : nullptr,
          .seeds = seeds ? seeds->const_data_ptr<int64_t>() : nullptr, .offset = offset, .tokens = nullptr,
          .batch = batch, .length = length, .vocab = vocab};
}

}  // namespace var_kernels
