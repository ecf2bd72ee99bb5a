// The C++ entries of packed_linear on CPUs, for products and for packing: checks, allocation, and the division of strips
// and blocks of rows over threads.
#include "packed_linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../checks.h"
#include "dispatch.h"

namespace var_kernels {

VAR_DECLARE_ISA_TABLES(PackedLinearTable, packed_linear_table)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The first column of every strip, and the number of columns.
std::vector<int64_t> strip_begins(int64_t columns) {
  std::vector<int64_t> begins{0};
  while (begins.back() < columns) begins.push_back(begins.back() + linear_strip(begins.back(), columns));
  return begins;
}

// x is (M, K), dense. packed_linear.py describes the order of the packed weights.
Tensor packed_linear(const Tensor& x, const Tensor& packed, const Tensor& bias, int64_t out_features, bool gelu) {
  const ScalarType dtype = x.scalar_type();
  const bool pairs = dtype == ScalarType::BFloat16;
  VAR_CHECK(pairs || dtype == ScalarType::Float, "x", "float32 or bfloat16", torch::headeronly::toString(dtype));
  VAR_CHECK(x.dim() == 2 && x.is_contiguous(), "x", "a dense tensor of shape (M, K)", x.dim(), " dimensions");
  const int64_t rows = x.size(0), depth = x.size(1);
  VAR_CHECK(depth > 0 && (!pairs || depth % 2 == 0), "x", pairs ? "an even number of columns" : "columns", depth);
  VAR_CHECK(packed.scalar_type() == dtype, "packed", torch::headeronly::toString(dtype),
            torch::headeronly::toString(packed.scalar_type()));
  VAR_CHECK(out_features > 0, "out_features", "a positive number", out_features);
  const int64_t columns = round_up(out_features, kLinearColumns);
  VAR_CHECK(packed.is_contiguous() && packed.numel() == columns * depth, "packed", columns * depth, packed.numel());
  VAR_CHECK(bias.scalar_type() == ScalarType::Float && bias.numel() == columns && bias.is_contiguous(), "bias",
            "a dense float32 vector, one for each padded column", bias.numel(), " elements");
  Tensor y = empty_cpu({rows, out_features}, dtype);
  if (rows == 0) return y;

  const auto kernel = packed_linear_table().strip[pairs];
  VAR_CHECK(kernel != nullptr, "x", "float32: this instruction set has no product of bfloat16", "bfloat16");
  const PackedLinear arguments{x.const_data_ptr(), packed.const_data_ptr(), bias.const_data_ptr<float>(),
                               y.mutable_data_ptr(), depth, columns, out_features, gelu};
  const std::vector<int64_t> begins = strip_begins(columns);
  const int64_t strips = int64_t(begins.size()) - 1, blocks = ceil_div(rows, kLinearRows);
  const auto row_of = [&](int64_t block) { return rows * block / blocks / 8 * 8; };  // whole register tiles
  parallel_tasks(strips * blocks, rows * columns * depth, [&](int64_t task) {
    const int64_t block = task / strips, column = begins[task % strips], strip = begins[task % strips + 1] - column;
    const int64_t first = row_of(block), end = block + 1 == blocks ? rows : row_of(block + 1);
    kernel(arguments, first, end - first, column, strip, thread_scratch((end - first) * strip));
  });
  return y;
}

// weight is (N, K), dense. `packed` is written.
void pack_linear(const Tensor& weight, const Tensor& packed) {
  const auto index = [](const char* argument, const Tensor& tensor) {
    const bool narrow = tensor.scalar_type() == ScalarType::BFloat16;
    VAR_CHECK(narrow || tensor.scalar_type() == ScalarType::Float, argument, "float32 or bfloat16",
              torch::headeronly::toString(tensor.scalar_type()));
    return narrow;
  };
  const bool from = index("weight", weight), to = index("packed", packed);
  VAR_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.numel() > 0, "weight",
            "a dense tensor of shape (N, K)", weight.dim(), " dimensions");
  const int64_t outputs = weight.size(0), inputs = weight.size(1), columns = round_up(outputs, kLinearColumns);
  const int64_t elements = columns * round_up(inputs, to ? 2 : 1);
  void* const to_data = packed.mutable_data_ptr();
  VAR_CHECK(packed.is_contiguous() && packed.numel() == elements, "packed", elements, packed.numel());
  VAR_CHECK(reinterpret_cast<uintptr_t>(to_data) % 64 == 0, "packed", "an address that 64 divides", "another one");
  const auto kernel = packed_linear_table().pack[from][to];
  VAR_CHECK(kernel != nullptr, "packed", "float32: this instruction set has no product of bfloat16", "bfloat16");
  const std::vector<int64_t> begins = strip_begins(columns);
  parallel_tasks(int64_t(begins.size()) - 1, elements, [&](int64_t task) {
    kernel(weight.const_data_ptr(), outputs, inputs, begins[task], begins[task + 1] - begins[task], to_data);
  });
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) {
  m.impl("_packed_linear", TORCH_BOX(&var_kernels::packed_linear));
  m.impl("_pack_linear", TORCH_BOX(&var_kernels::pack_linear));
}
