// The one check of the native code: a violated precondition becomes a Python RuntimeError that names the argument,
// what was expected and what came. The Python door has validated user input already; these guard the raw ops.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define VAR_CHECK(condition, argument, expected, ...) \
  STD_TORCH_CHECK(condition, "var_kernels: ", argument, ": expected ", expected, ", got ", __VA_ARGS__)

namespace var_kernels {

// 0, 1, 2 for fp32, bf16, fp16, in whose order the tables of kernels are; no other dtype is accepted.
inline int dtype_index(const char* argument, const torch::stable::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return 0;
    case torch::headeronly::ScalarType::BFloat16: return 1;
    case torch::headeronly::ScalarType::Half: return 2;
    default: break;
  }
  VAR_CHECK(false, argument, "float32, bfloat16 or float16", torch::headeronly::toString(tensor.scalar_type()));
}

}  // namespace var_kernels
