// The C++ entry of adaln_layer_norm and gated_residual_adaln on CPUs: checks, allocation, and work over threads.
#include "adaln_layer_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../adaln_layer_norm_checks.h"
#include "dispatch.h"

namespace var_kernels {

VAR_DECLARE_ISA_TABLES(AdaLNTable, adaln_table)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerTask = 1 << 15, kWorkPerElement = 32;
// How many tokens of the backward are summed into one row of partial sums. This fixes the order of summation, so it
// must not depend on the number of threads. With 48 the partial sums take 1/16 of the memory traffic of one input, and
// L = 680 gives 15 tasks per sample.
constexpr int64_t kTokensPerPartial = 48;

// Whether to store the outputs past the caches, for an op that moves `moved` bytes for each element of x. The rows of
// the outputs must then start on a cache line.
bool streams(const Tensor& x, int64_t moved, std::initializer_list<const Tensor*> outputs) {
  return std::all_of(outputs.begin(), outputs.end(), [&](const Tensor* output) {
    return stored_past_caches(x.numel() * moved, x.size(2) * output->element_size(), output->const_data_ptr());
  });
}

// ---- forward ----------------------------------------------------------------------------------------------------

void forward(const Tensor& x, const Tensor& y, const AdaLNForward& arguments) {
  const int64_t total = x.size(0) * x.size(1), channels = x.size(2);
  if (channels == 0) return;
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / channels);
  const bool mixed = y.scalar_type() != x.scalar_type();
  const auto kernel = adaln_table().forward[mixed ? 2 + dtype_index("y", y) : dtype_index("x", x)];
  parallel_tasks(ceil_div(total, rows_per_task), total * channels * kWorkPerElement, [&](int64_t task) {
    kernel(arguments, task * rows_per_task, std::min(total, (task + 1) * rows_per_task), thread_scratch(channels));
  });
}

std::tuple<Tensor, Tensor, Tensor> adaln_layer_norm(const Tensor& x_in, const Tensor& scale_in, const Tensor& shift_in,
                                                    double eps) {
  check_x(x_in);
  const Tensor x = token_rows("x", x_in, x_in);
  const Tensor scale = modulation_rows("scale", scale_in, x), shift = modulation_rows("shift", shift_in, x);
  Tensor y = empty_cpu({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor mean = empty_cpu({x.size(0), x.size(1)}, ScalarType::Float);
  Tensor rstd = empty_cpu({x.size(0), x.size(1)}, ScalarType::Float);
  forward(x, y, {.x = rows(x), .branch = {}, .gate = {}, .scale = rows(scale), .shift = rows(shift),
                 .residual = nullptr, .y = y.mutable_data_ptr(), .mean = mean.mutable_data_ptr<float>(),
                 .rstd = rstd.mutable_data_ptr<float>(), .length = x.size(1), .channels = x.size(2),
                 .eps = float(eps), .stream = streams(x, 2 * x.element_size(), {&y})});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_adaln(const Tensor& x_in, const Tensor& branch_in,
                                                                const Tensor& gate_in, const Tensor& scale_in,
                                                                const Tensor& shift_in, double eps) {
  check_x(x_in);
  const Tensor x = token_rows("x", x_in, x_in), branch = branch_rows(branch_in, x);
  const Tensor gate = modulation_rows("gate", gate_in, x);
  const Tensor scale = modulation_rows("scale", scale_in, x), shift = modulation_rows("shift", shift_in, x);
  Tensor residual = empty_cpu({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor y = empty_cpu({x.size(0), x.size(1), x.size(2)}, branch.scalar_type());
  Tensor mean = empty_cpu({x.size(0), x.size(1)}, ScalarType::Float);
  Tensor rstd = empty_cpu({x.size(0), x.size(1)}, ScalarType::Float);
  forward(x, y, {.x = rows(x), .branch = rows(branch), .gate = rows(gate), .scale = rows(scale),
                 .shift = rows(shift), .residual = residual.mutable_data_ptr(), .y = y.mutable_data_ptr(),
                 .mean = mean.mutable_data_ptr<float>(), .rstd = rstd.mutable_data_ptr<float>(),
                 .length = x.size(1), .channels = x.size(2), .eps = float(eps),
                 .stream = streams(x, 2 * x.element_size() + 2 * branch.element_size(), {&residual, &y})});
  return {residual, y, mean, rstd};
}

// ---- backward ---------------------------------------------------------------------------------------------------

// The gradient of one modulation tensor: its output, and where the kernel writes it. Unless each token has a row of its
// own, tokens are summed through rows of partial sums.
struct Reduction {
  Tensor out;
  ModulationGrad target;

  Reduction(const Tensor& x, int64_t samples, int64_t tokens)
      : out(empty_cpu({samples, tokens, x.size(2)}, x.scalar_type())), target{} {
    if (samples == x.size(0) && tokens == x.size(1)) target.per_token = out.mutable_data_ptr();
  }
  Reduction(const Tensor& x, const Tensor& modulation) : Reduction(x, modulation.size(0), modulation.size(1)) {}
};

int64_t partials_per_sample(const Tensor& x) {
  return std::max<int64_t>(1, ceil_div(x.size(1), kTokensPerPartial));
}

// Gives every gradient that is summed over tokens its memory for partial sums: a row for each (sample, chunk of
// tokens).
void place_partials(const Tensor& x, std::initializer_list<Reduction*> reductions) {
  const int64_t floats = x.size(0) * partials_per_sample(x) * x.size(2);
  float* memory = thread_scratch(floats * int64_t(reductions.size()));
  for (Reduction* reduction : reductions) {
    if (reduction->target.per_token != nullptr) continue;
    reduction->target.partial = memory;
    memory += floats;
  }
}

void run_backward(const Tensor& x, const AdaLNBackward& arguments) {
  const int64_t length = x.size(1), chunks = partials_per_sample(x);
  const auto kernel = adaln_table().backward[dtype_index("x", x)];
  parallel_tasks(x.size(0) * chunks, x.numel() * kWorkPerElement, [&](int64_t task) {
    const int64_t chunk = task % chunks;
    kernel(arguments, task / chunks, length * chunk / chunks, length * (chunk + 1) / chunks, task);
  });
}

// Adds up the partial sums, in ascending order of sample and token, and stores the gradient.
void finish(const Tensor& x, const Reduction& reduction) {
  if (reduction.target.per_token != nullptr || reduction.out.numel() == 0) return;
  constexpr int64_t kBlock = 1024;
  const int64_t channels = x.size(2), blocks = ceil_div(channels, kBlock), rows = reduction.out.size(0);
  const int64_t count = rows == 0 ? 0 : x.size(0) * partials_per_sample(x) / rows;
  const int dtype = dtype_index("x", x);
  const int64_t row_bytes = channels * reduction.out.element_size();
  char* out = static_cast<char*>(reduction.out.mutable_data_ptr());
  parallel_tasks(rows * blocks, rows * count * channels * kWorkPerElement, [&](int64_t task) {
    const int64_t row = task / blocks, begin = task % blocks * kBlock;
    adaln_table().sum_partials[dtype](reduction.target.partial + row * count * channels, count, channels, begin,
                                      std::min(channels, begin + kBlock), out + row * row_bytes);
  });
}

std::tuple<Tensor, Tensor, Tensor> adaln_layer_norm_backward(const Tensor& dy_in, const Tensor& x_in,
                                                             const Tensor& scale_in, const Tensor& mean_in,
                                                             const Tensor& rstd_in, bool shift_per_sample,
                                                             bool shift_per_token) {
  check_x(x_in);
  const Tensor x = token_rows("x", x_in, x_in), dy = token_rows("dy", dy_in, x);
  const Tensor scale = modulation_rows("scale", scale_in, x);
  const Tensor mean = statistic("mean", mean_in, x), rstd = statistic("rstd", rstd_in, x);
  Tensor dx = empty_cpu({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Reduction dscale(x, scale), dshift(x, shift_per_sample ? x.size(0) : 1, shift_per_token ? x.size(1) : 1);
  if (x.size(2) > 0) {
    place_partials(x, {&dscale, &dshift});
    run_backward(x, {.dresidual = {}, .dy = rows(dy), .x = rows(x), .branch = {}, .gate = {}, .scale = rows(scale),
                     .mean = mean.const_data_ptr<float>(), .rstd = rstd.const_data_ptr<float>(),
                     .dx = dx.mutable_data_ptr(), .dbranch = nullptr, .dgate = {}, .dscale = dscale.target,
                     .dshift = dshift.target, .length = x.size(1), .channels = x.size(2),
                     .stream = streams(x, 3 * x.element_size(), {&dx})});
    for (const Reduction* reduction : {&dscale, &dshift}) finish(x, *reduction);
  }
  return {dx, dscale.out, dshift.out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_backward(
    const std::optional<Tensor>& dresidual_in, const std::optional<Tensor>& dy_in, const Tensor& residual_in,
    const Tensor& branch_in, const Tensor& gate_in, const Tensor& scale_in, const Tensor& mean_in,
    const Tensor& rstd_in, bool shift_per_sample, bool shift_per_token) {
  check_x(residual_in);
  const Tensor x = token_rows("residual", residual_in, residual_in), branch = token_rows("branch", branch_in, x);
  const Tensor gate = modulation_rows("gate", gate_in, x), scale = modulation_rows("scale", scale_in, x);
  const Tensor mean = statistic("mean", mean_in, x), rstd = statistic("rstd", rstd_in, x);
  // An absent gradient is one row of zeros that every token reads.
  const bool absent = !dresidual_in || !dy_in;
  const Tensor zeros = absent ? torch::stable::new_zeros(x, {1, 1, x.size(2)}) : x;
  const Tensor dresidual = dresidual_in ? token_rows("dresidual", *dresidual_in, x) : zeros;
  const Tensor dy = dy_in ? token_rows("dy", *dy_in, x) : zeros;
  Tensor dx = empty_cpu({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor dbranch = empty_cpu({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Reduction dgate(x, gate), dscale(x, scale);
  Reduction dshift(x, shift_per_sample ? x.size(0) : 1, shift_per_token ? x.size(1) : 1);
  if (x.size(2) > 0) {
    place_partials(x, {&dgate, &dscale, &dshift});
    run_backward(x, {.dresidual = rows(dresidual), .dy = rows(dy), .x = rows(x), .branch = rows(branch),
                     .gate = rows(gate), .scale = rows(scale), .mean = mean.const_data_ptr<float>(),
                     .rstd = rstd.const_data_ptr<float>(), .dx = dx.mutable_data_ptr(),
                     .dbranch = dbranch.mutable_data_ptr(), .dgate = dgate.target, .dscale = dscale.target,
                     .dshift = dshift.target, .length = x.size(1), .channels = x.size(2),
                     .stream = streams(x, 6 * x.element_size(), {&dx, &dbranch})});
    for (const Reduction* reduction : {&dgate, &dscale, &dshift}) finish(x, *reduction);
  }
  return {dx, dbranch, dgate.out, dscale.out, dshift.out};
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) {
  m.impl("_adaln_layer_norm", TORCH_BOX(&var_kernels::adaln_layer_norm));
  m.impl("_adaln_layer_norm_backward", TORCH_BOX(&var_kernels::adaln_layer_norm_backward));
  m.impl("_gated_residual_adaln", TORCH_BOX(&var_kernels::gated_residual_adaln));
  m.impl("_gated_residual_adaln_backward", TORCH_BOX(&var_kernels::gated_residual_adaln_backward));
}
