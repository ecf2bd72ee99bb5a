// VAR_CHECK, with which the native code checks arguments: a violated precondition becomes a Python RuntimeError that
// names the argument, what was expected and what came. The public Python functions have already checked the arguments
// of users; these checks protect the raw ops.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>
#include <vector>

#define VAR_CHECK(condition, argument, expected, ...) \
  STD_TORCH_CHECK(condition, "var_kernels: ", argument, ": expected ", expected, ", got ", __VA_ARGS__)

namespace var_kernels {

// 0, 1, 2 for fp32, bf16, fp16, which is the order of the tables of kernels. No other dtype is accepted.
inline int dtype_index(const char* argument, const torch::stable::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return 0;
    case torch::headeronly::ScalarType::BFloat16: return 1;
    case torch::headeronly::ScalarType::Half: return 2;
    default: break;
  }
  VAR_CHECK(false, argument, "float32, bfloat16 or float16", torch::headeronly::toString(tensor.scalar_type()));
}

// The text for a shape in the message of a check.
inline std::string shape_text(const std::vector<int64_t>& sizes) {
  std::string text = "shape (";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d == 0 ? "" : ", ") + std::to_string(sizes[d]);
  return text + ")";
}

inline std::string shape_text(const torch::stable::Tensor& x) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) sizes[d] = x.size(d);
  return shape_text(sizes);
}

}  // namespace var_kernels
