// The C++ entries of winograd_conv on CPUs, for convolutions and for packing: checks, and the division of work over
// threads.
#include "winograd_conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"
#include "dispatch.h"

namespace var_kernels {

VAR_DECLARE_ISA_TABLES(WinogradConvTable, winograd_conv_table)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// x and y are dense, with their channels last. winograd_conv.py describes the order of the packed weights.
void winograd_conv(const Tensor& x, const Tensor& packed, const Tensor& bias, const std::optional<Tensor>& residual,
                   int64_t scheme_index, const Tensor& y) {
  const ScalarType dtype = x.scalar_type();
  VAR_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "x", "float32 or bfloat16",
            torch::headeronly::toString(dtype));
  VAR_CHECK(x.dim() == 4 && x.is_contiguous(), "x", "a dense tensor of shape (B, H, W, C)", x.dim(), " dimensions");
  VAR_CHECK(scheme_index >= 0 && scheme_index < 3, "scheme", "0, 1 or 2", scheme_index);
  const WinogradScheme& scheme = kWinogradSchemes[scheme_index];
  const int64_t batch = x.size(0), height = x.size(1), width = x.size(2), channels = x.size(3);
  VAR_CHECK(channels > 0, "x", "at least one channel", channels);
  VAR_CHECK(y.scalar_type() == dtype && y.dim() == 4 && y.is_contiguous() && y.size(0) == batch &&
                y.size(1) == height * scheme.scale && y.size(2) == width * scheme.scale && y.size(3) > 0,
            "y", "a dense tensor (B, scale·H, scale·W, C_out) with the dtype of x", y.numel(), " elements");
  const int64_t out_channels = y.size(3);
  const int64_t depth = round_up(channels, kWinogradDepth), points = scheme.points * scheme.points;
  const bool pairs = packed.scalar_type() == ScalarType::BFloat16;
  VAR_CHECK((pairs && dtype == ScalarType::BFloat16) || packed.scalar_type() == ScalarType::Float, "packed",
            "float32, or bfloat16 like x", torch::headeronly::toString(packed.scalar_type()));
  VAR_CHECK(packed.is_contiguous() && packed.numel() == points * depth * round_up(out_channels, kWinogradColumns),
            "packed", points * depth * round_up(out_channels, kWinogradColumns), packed.numel());
  VAR_CHECK(bias.scalar_type() == ScalarType::Float && bias.numel() == out_channels && bias.is_contiguous(), "bias",
            "a dense float32 vector, one for each output channel", bias.numel(), " elements");
  if (residual) {
    bool same = residual->scalar_type() == dtype && residual->dim() == 4 && residual->is_contiguous();
    for (int64_t d = 0; same && d < 4; ++d) same = residual->size(d) == y.size(d);
    VAR_CHECK(same, "residual", "shape and dtype of the result, dense", residual->numel(), " elements");
  }
  if (y.numel() == 0) return;

  const auto kernel = winograd_conv_table().tiles[scheme_index][dtype == ScalarType::Float ? 0 : pairs ? 1 : 2];
  VAR_CHECK(kernel != nullptr, "packed", "float32: this instruction set has no product of bfloat16", "bfloat16");
  WinogradConv arguments{x.const_data_ptr(), packed.const_data_ptr(), bias.const_data_ptr<float>(),
                         residual ? residual->const_data_ptr() : nullptr, y.mutable_data_ptr(),
                         height, width, channels, out_channels, false};
  const int64_t row_bytes = out_channels * y.element_size();
  arguments.stream = stored_past_caches(y.numel() / out_channels * row_bytes, row_bytes, arguments.y);

  // The transformed inputs of a block take a little more than half of a common second-level cache (1 MiB).
  constexpr int64_t kBlockBytes = 640 << 10, kLeast = 32, kMost = 128;
  const int64_t tiles = scheme.tiles(height) * scheme.tiles(width);
  const int64_t fitting = kBlockBytes / (points * depth * (pairs ? 2 : 4)) / kWinogradColumns * kWinogradColumns;
  const int64_t block = std::min(std::max(kLeast, std::min(kMost, fitting)), round_up(tiles, kWinogradColumns));
  const int64_t blocks = ceil_div(tiles, block);
  const int64_t floats = scheme.scratch_floats(block, depth, channels);

  // A task is a block. If blocks alone would leave threads idle, a task is some strips of the columns of a block:
  // transforming the inputs again for each of them costs little.
  const int64_t columns = round_up(out_channels, kWinogradColumns), strips = ceil_div(columns, kWinogradStrip);
  const int64_t threads = torch::stable::get_num_threads();
  const auto idle = [&](int64_t tasks) { return round_up(tasks, threads) * 4 > tasks * 5; };
  int64_t parts = 1;
  while (parts < strips && idle(batch * blocks * parts)) ++parts;
  const int64_t work = batch * tiles * points * depth * out_channels;
  parallel_tasks(batch * blocks * parts, work, [&](int64_t task) {
    const int64_t part = task % parts, first = task / parts % blocks * block;
    const auto column_of = [&](int64_t i) { return std::min(columns, strips * i / parts * kWinogradStrip); };
    kernel(arguments, task / parts / blocks, first, std::min(block, tiles - first), column_of(part),
           column_of(part + 1), thread_scratch(floats));
  });
}

// weight is (C_out, C_in, 3, 3) and transform (points, 3), dense. `packed` is written.
void pack_winograd(const Tensor& weight, const Tensor& transform, const Tensor& packed) {
  VAR_CHECK(weight.scalar_type() == ScalarType::Float && weight.dim() == 4 && weight.is_contiguous() &&
                weight.numel() > 0 && weight.size(2) == 3 && weight.size(3) == 3,
            "weight", "a dense float32 tensor (C_out, C_in, 3, 3)", weight.numel(), " elements");
  VAR_CHECK(transform.scalar_type() == ScalarType::Double && transform.dim() == 2 && transform.is_contiguous() &&
                (transform.size(0) == 3 || transform.size(0) == 4 || transform.size(0) == 6) &&
                transform.size(1) == 3,
            "transform", "a dense float64 tensor (3, 4 or 6, 3)", transform.numel(), " elements");
  const bool pairs = packed.scalar_type() == ScalarType::BFloat16;
  VAR_CHECK(pairs || packed.scalar_type() == ScalarType::Float, "packed", "float32 or bfloat16",
            torch::headeronly::toString(packed.scalar_type()));
  const int64_t out_channels = weight.size(0), channels = weight.size(1), points = transform.size(0);
  const WinogradFilters filters{weight.const_data_ptr<float>(), transform.const_data_ptr<double>(),
                                packed.mutable_data_ptr(), out_channels, channels,
                                round_up(channels, kWinogradDepth), round_up(out_channels, kWinogradColumns),
                                int(points)};
  const int64_t elements = points * points * filters.depth * filters.columns;
  VAR_CHECK(packed.is_contiguous() && packed.numel() == elements, "packed", elements, packed.numel());
  VAR_CHECK(reinterpret_cast<uintptr_t>(filters.packed) % 64 == 0, "packed", "an address that 64 divides",
            "another one");
  const auto kernel = winograd_conv_table().pack[pairs];
  VAR_CHECK(kernel != nullptr, "packed", "float32: this instruction set has no product of bfloat16", "bfloat16");
  const int64_t blocks = filters.depth / kWinogradDepth;
  parallel_tasks(blocks * ceil_div(filters.columns, kWinogradStrip), 8 * elements, [&](int64_t task) {
    kernel(filters, task / blocks * kWinogradStrip, task % blocks * kWinogradDepth);
  });
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) {
  m.impl("_winograd_conv", TORCH_BOX(&var_kernels::winograd_conv));
  m.impl("_pack_winograd", TORCH_BOX(&var_kernels::pack_winograd));
}
