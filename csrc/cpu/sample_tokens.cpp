// The C++ entry of sample_tokens on CPUs: checks, allocation, and work over threads.
#include "sample_tokens.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../sample_tokens_checks.h"
#include "dispatch.h"

namespace var_kernels {

VAR_DECLARE_ISA_TABLES(SampleTokensTable, sample_tokens_table)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

Tensor sample_tokens(const Tensor& conditional_in, const std::optional<Tensor>& unconditional_in, double guidance,
                     int64_t top_k, double top_p, const std::optional<Tensor>& noise_in,
                     const std::optional<Tensor>& seeds_in, int64_t offset) {
  const Tensor conditional = dense_last(conditional_in);
  const std::optional<Tensor> unconditional =
      unconditional_in ? std::optional(dense_last(*unconditional_in)) : std::nullopt;
  const std::optional<Tensor> noise = contiguous(noise_in), seeds = contiguous(seeds_in);
  SampleTokens arguments =
      check_sample_tokens(conditional, unconditional, guidance, top_k, top_p, noise, seeds, offset);
  Tensor tokens = empty_cpu({arguments.batch, arguments.length}, ScalarType::Long);
  arguments.tokens = tokens.mutable_data_ptr<int64_t>();

  const auto kernel = sample_tokens_table().row[dtype_index("conditional", conditional)];
  const int64_t rows = arguments.batch * arguments.length;
  constexpr int64_t kWorkPerLogit = 64;
  parallel_tasks(rows, rows * arguments.vocab * kWorkPerLogit, [&](int64_t row) {
    kernel(arguments, row, thread_scratch(sample_tokens_scratch(arguments.vocab)));
  });
  return tokens;
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) { m.impl("_sample_tokens", TORCH_BOX(&var_kernels::sample_tokens)); }
