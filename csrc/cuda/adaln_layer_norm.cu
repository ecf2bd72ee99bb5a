// The launchers and the entry functions of adaln_layer_norm and gated_residual_adaln on CUDA devices.
#include "adaln_layer_norm.cuh"
#include "adaln_layer_norm_backward.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>

#include "../adaln_layer_norm_checks.h"
#include "launch.h"

namespace var_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- which threads do what ----------------------------------------------------------------------------------------

// Divides the rows among workers. `warps` warps in flight keep a GPU busy. If there are more rows than that, a worker
// gets several tokens, from `least` to `most`.
Partition partition_of(const Tensor& x, int threads, int64_t warps, int64_t least, int64_t most) {
  const int64_t samples = x.size(0), length = x.size(1);
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  VAR_CHECK(samples * length <= kMost && x.size(2) <= kMost, "x", "less than 2^31 tokens, and channels", "(", samples,
            ", ", length, ", ", x.size(2), ")");
  if (samples == 0 || length == 0) return {0, 0, 0};
  const int64_t wanted = ceil_div(warps * 32 / threads, samples);
  const int64_t workers = std::clamp(wanted, ceil_div(length, most), ceil_div(length, least));
  return {int(samples), int(length), int(workers)};
}

// In forward, each additional worker reads the modulation once more. That is cheap, so a large problem may have several
// waves of workers.
Partition forward_partition(const Tensor& x, int threads) { return partition_of(x, threads, 4096, 1, 16); }
// In backward, each additional worker writes a row of partial sums. This number of warps is one wave on a GPU of 108
// multiprocessors and writes at most 5 MB of sums, which fit in the L2 cache.
Partition backward_partition(const Tensor& x, int threads, bool gated) {
  return partition_of(x, threads, gated ? 1536 : 2048, 4, std::numeric_limits<int>::max());
}

// Four workers of one warp share a block; a worker of several warps is a block of its own.
LaunchShape launch_shape(int threads, const Partition& partition) {
  const int64_t per_block = threads == 32 ? 4 : 1, workers = partition.samples * partition.workers;
  return {dim3(unsigned(ceil_div(workers, per_block))), dim3(unsigned(threads), unsigned(per_block))};
}

// Which kernel serves the rows: each of `threads` threads has `elements` channels. 0 elements mean the plain kernel.
struct Tiling {
  int elements, threads;
};

bool vectors_fit(const Tensor& x, std::initializer_list<const Rows*> all) {
  const int64_t width = x.scalar_type() == ScalarType::Float ? 4 : 8;
  bool fit = x.size(2) % width == 0;
  for (const Rows* rows : all)
    fit &= reinterpret_cast<uintptr_t>(rows->data) % 16 == 0 && rows->per_sample % width == 0 &&
           rows->per_token % width == 0;
  return fit;
}

Tiling tiling(const Tensor& x, int elements, std::initializer_list<const Rows*> all) {
  const int64_t channels = x.size(2), per_warp = elements * 32;
  if (!vectors_fit(x, all) || channels > elements * kMaxThreads) return {0, channels <= 256 ? 32 : kPlainThreads};
  return {elements, int(ceil_div(channels, per_warp)) * 32};
}

// ---- launchers ----------------------------------------------------------------------------------------------------

template <class T, bool kGated, class Branch = T>
void launch_forward(const OnDevice& device, const Tiling& tile, const LaunchShape& shape, const Forward& arguments) {
  constexpr int kEight = 8 / kPackWidth<T>;
  const auto kernel = tile.elements == 8    ? forward_kernel<T, kGated, kEight, Branch>
                      : tile.elements == 16 ? forward_kernel<T, kGated, 2 * kEight, Branch>
                                            : plain_forward_kernel<T, kGated, Branch>;
  launch(device, kGated ? "gated_residual_adaln" : "adaln_layer_norm", kernel, shape, arguments);
}

// Backward allows fewer elements than forward, because up to three rows of sums stay in registers as well.
constexpr int kBackwardElements = 8;

template <class T, bool kGated>
void launch_backward(const OnDevice& device, const Tiling& tile, const LaunchShape& shape,
                     const GpuAdaLnBackward& arguments) {
  const auto kernel = tile.elements == kBackwardElements
                          ? backward_kernel<T, kGated, kBackwardElements / kPackWidth<T>>
                          : plain_backward_kernel<T, kGated>;
  launch(device, kGated ? "gated_residual_adaln backward" : "adaln_layer_norm backward", kernel, shape, arguments);
}

void forward(const OnDevice& device, const Tensor& x, const Tensor& y, Forward arguments) {
  if (x.numel() == 0) return;
  // With more elements per thread, more bytes are in flight and fewer warps have to be waited for. Short rows get fewer
  // elements per thread, so that all lanes of one warp have some.
  const Tiling tile = tiling(x, x.size(2) <= 256 ? 8 : 16,
                             {&arguments.x, &arguments.branch, &arguments.gate, &arguments.scale, &arguments.shift});
  arguments.partition = forward_partition(x, tile.threads);
  const LaunchShape shape = launch_shape(tile.threads, arguments.partition);
  if (y.scalar_type() != x.scalar_type())
    return y.scalar_type() == ScalarType::BFloat16 ? launch_forward<float, true, bf16>(device, tile, shape, arguments)
                                                   : launch_forward<float, true, fp16>(device, tile, shape, arguments);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    arguments.branch.data != nullptr ? launch_forward<T, true>(device, tile, shape, arguments)
                                     : launch_forward<T, false>(device, tile, shape, arguments);
  });
}

// One modulation gradient: its output, and its partial sums unless the output has a row for every token.
struct GpuReduction {
  Tensor out, partial;
  bool per_token;

  GpuReduction(const OnDevice& device, const Tensor& x, int64_t samples, int64_t tokens, const Partition& partition)
      : out(device.empty({samples, tokens, x.size(2)}, x.scalar_type())),
        partial(out),
        per_token(samples == x.size(0) && tokens == x.size(1)) {
    if (!per_token) partial = device.empty({partition.samples * partition.workers, x.size(2)}, ScalarType::Float);
  }

  GpuModulationGrad target() const {
    if (per_token) return {out.mutable_data_ptr(), nullptr};
    return {nullptr, partial.mutable_data_ptr<float>()};
  }
};

// Adds the partial sums up to the gradients. The shape determines the order of the sums.
void finish(const OnDevice& device, const Tensor& x, std::initializer_list<const GpuReduction*> reductions) {
  PartialSums sums = {};
  sums.channels = int(x.size(2));
  unsigned outputs = 0;
  int64_t most_rows = 0;
  for (const GpuReduction* reduction : reductions) {
    const int64_t rows = reduction->out.size(0);
    if (reduction->per_token || reduction->out.numel() == 0) continue;
    sums.of[outputs++] = {reduction->partial.const_data_ptr<float>(), reduction->out.mutable_data_ptr(), int(rows),
                          int(reduction->partial.size(0) / rows)};
    most_rows = std::max(most_rows, rows);
  }
  if (outputs == 0) return;
  constexpr int64_t kMaxGrid = 65535;
  const LaunchShape shape = {dim3(unsigned(ceil_div(sums.channels, kSumColumns)),
                                  unsigned(std::min(most_rows, kMaxGrid)), outputs),
                             dim3(kSumColumns, kSumSlices)};
  with_dtype(x, [&](auto zero) {
    launch(device, "adaln_layer_norm sums", sum_partials_kernel<decltype(zero)>, shape, sums);
  });
}

// ---- forward ------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> adaln_layer_norm(const Tensor& x_in, const Tensor& scale_in, const Tensor& shift_in,
                                                    double eps) {
  check_x(x_in);
  const OnDevice device(x_in);
  const Tensor x = token_rows("x", x_in, x_in);
  const Tensor scale = modulation_rows("scale", scale_in, x), shift = modulation_rows("shift", shift_in, x);
  Tensor y = device.empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor mean = device.empty({x.size(0), x.size(1)}, ScalarType::Float);
  Tensor rstd = device.empty({x.size(0), x.size(1)}, ScalarType::Float);
  forward(device, x, y, {.x = rows(x), .branch = {}, .gate = {}, .scale = rows(scale), .shift = rows(shift),
                         .residual = nullptr, .y = y.mutable_data_ptr(), .mean = mean.mutable_data_ptr<float>(),
                         .rstd = rstd.mutable_data_ptr<float>(), .partition = {}, .channels = int(x.size(2)),
                         .eps = float(eps)});
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_adaln(const Tensor& x_in, const Tensor& branch_in,
                                                                const Tensor& gate_in, const Tensor& scale_in,
                                                                const Tensor& shift_in, double eps) {
  check_x(x_in);
  const OnDevice device(x_in);
  const Tensor x = token_rows("x", x_in, x_in), branch = branch_rows(branch_in, x);
  const Tensor gate = modulation_rows("gate", gate_in, x);
  const Tensor scale = modulation_rows("scale", scale_in, x), shift = modulation_rows("shift", shift_in, x);
  Tensor residual = device.empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor y = device.empty({x.size(0), x.size(1), x.size(2)}, branch.scalar_type());
  Tensor mean = device.empty({x.size(0), x.size(1)}, ScalarType::Float);
  Tensor rstd = device.empty({x.size(0), x.size(1)}, ScalarType::Float);
  forward(device, x, y, {.x = rows(x), .branch = rows(branch), .gate = rows(gate), .scale = rows(scale),
                         .shift = rows(shift), .residual = residual.mutable_data_ptr(), .y = y.mutable_data_ptr(),
                         .mean = mean.mutable_data_ptr<float>(), .rstd = rstd.mutable_data_ptr<float>(),
                         .partition = {}, .channels = int(x.size(2)), .eps = float(eps)});
  return {residual, y, mean, rstd};
}

// ---- backward -----------------------------------------------------------------------------------------------------

void run_backward(const OnDevice& device, const Tensor& x, const Tiling& tile, const GpuAdaLnBackward& arguments) {
  if (x.numel() == 0) return;
  const LaunchShape shape = launch_shape(tile.threads, arguments.partition);
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    arguments.branch.data != nullptr ? launch_backward<T, true>(device, tile, shape, arguments)
                                     : launch_backward<T, false>(device, tile, shape, arguments);
  });
}

std::tuple<Tensor, Tensor, Tensor> adaln_layer_norm_backward(const Tensor& dy_in, const Tensor& x_in,
                                                             const Tensor& scale_in, const Tensor& mean_in,
                                                             const Tensor& rstd_in, bool shift_per_sample,
                                                             bool shift_per_token) {
  check_x(x_in);
  const OnDevice device(x_in);
  const Tensor x = token_rows("x", x_in, x_in), dy = token_rows("dy", dy_in, x);
  const Tensor scale = modulation_rows("scale", scale_in, x);
  const Tensor mean = statistic("mean", mean_in, x), rstd = statistic("rstd", rstd_in, x);
  const Rows x_rows = rows(x), dy_rows = rows(dy), scale_rows = rows(scale);
  const Tiling tile = tiling(x, kBackwardElements, {&x_rows, &dy_rows, &scale_rows});
  const Partition partition = backward_partition(x, tile.threads, false);
  Tensor dx = device.empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  const GpuReduction dscale(device, x, scale.size(0), scale.size(1), partition);
  const GpuReduction dshift(device, x, shift_per_sample ? x.size(0) : 1, shift_per_token ? x.size(1) : 1, partition);
  run_backward(device, x, tile,
               {.dresidual = {}, .dy = dy_rows, .x = x_rows, .branch = {}, .gate = {}, .scale = scale_rows,
                .mean = mean.const_data_ptr<float>(), .rstd = rstd.const_data_ptr<float>(),
                .dx = dx.mutable_data_ptr(), .dbranch = nullptr, .dgate = {}, .dscale = dscale.target(),
                .dshift = dshift.target(), .partition = partition, .channels = int(x.size(2))});
  finish(device, x, {&dscale, &dshift});
  return {dx, dscale.out, dshift.out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_residual_adaln_backward(
    const std::optional<Tensor>& dresidual_in, const std::optional<Tensor>& dy_in, const Tensor& residual_in,
    const Tensor& branch_in, const Tensor& gate_in, const Tensor& scale_in, const Tensor& mean_in,
    const Tensor& rstd_in, bool shift_per_sample, bool shift_per_token) {
  check_x(residual_in);
  const OnDevice device(residual_in);
  const Tensor x = token_rows("residual", residual_in, residual_in), branch = token_rows("branch", branch_in, x);
  const Tensor gate = modulation_rows("gate", gate_in, x), scale = modulation_rows("scale", scale_in, x);
  const Tensor mean = statistic("mean", mean_in, x), rstd = statistic("rstd", rstd_in, x);
  const Tensor dresidual = dresidual_in ? token_rows("dresidual", *dresidual_in, x) : x;
  const Tensor dy = dy_in ? token_rows("dy", *dy_in, x) : x;
  const Rows dresidual_rows = dresidual_in ? rows(dresidual) : Rows{}, dy_rows = dy_in ? rows(dy) : Rows{};
  const Rows x_rows = rows(x), branch_rows = rows(branch), gate_rows = rows(gate), scale_rows = rows(scale);
  const Tiling tile =
      tiling(x, kBackwardElements, {&dresidual_rows, &dy_rows, &x_rows, &branch_rows, &gate_rows, &scale_rows});
  const Partition partition = backward_partition(x, tile.threads, true);
  Tensor dx = device.empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  Tensor dbranch = device.empty({x.size(0), x.size(1), x.size(2)}, x.scalar_type());
  const GpuReduction dgate(device, x, gate.size(0), gate.size(1), partition);
  const GpuReduction dscale(device, x, scale.size(0), scale.size(1), partition);
  const GpuReduction dshift(device, x, shift_per_sample ? x.size(0) : 1, shift_per_token ? x.size(1) : 1, partition);
  run_backward(device, x, tile,
               {.dresidual = dresidual_rows, .dy = dy_rows, .x = x_rows, .branch = branch_rows, .gate = gate_rows,
                .scale = scale_rows, .mean = mean.const_data_ptr<float>(), .rstd = rstd.const_data_ptr<float>(),
                .dx = dx.mutable_data_ptr(), .dbranch = dbranch.mutable_data_ptr(), .dgate = dgate.target(),
                .dscale = dscale.target(), .dshift = dshift.target(), .partition = partition,
                .channels = int(x.size(2))});
  finish(device, x, {&dgate, &dscale, &dshift});
  return {dx, dbranch, dgate.out, dscale.out, dshift.out};
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) {
  m.impl("_adaln_layer_norm", TORCH_BOX(&var_kernels::adaln_layer_norm));
  m.impl("_adaln_layer_norm_backward", TORCH_BOX(&var_kernels::adaln_layer_norm_backward));
  m.impl("_gated_residual_adaln", TORCH_BOX(&var_kernels::gated_residual_adaln));
  m.impl("_gated_residual_adaln_backward", TORCH_BOX(&var_kernels::gated_residual_adaln_backward));
}
