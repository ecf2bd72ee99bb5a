// The checks of the arguments of adaln_layer_norm and gated_residual_adaln, for the entry functions of CPU and CUDA.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "rows.h"

namespace var_kernels {

inline void check_x(const torch::stable::Tensor& x) {
  VAR_CHECK(x.dim() == 3, "x", "3 dimensions", x.dim());
  dtype_index("x", x);
}

inline void check_like(const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& x,
                       torch::headeronly::ScalarType dtype) {
  VAR_CHECK(tensor.scalar_type() == dtype, name, torch::headeronly::toString(dtype),
            torch::headeronly::toString(tensor.scalar_type()));
  VAR_CHECK(tensor.dim() == 3, name, "3 dimensions", tensor.dim());
  VAR_CHECK(tensor.size(2) == x.size(2), name, x.size(2), tensor.size(2), " channels");
}

inline torch::stable::Tensor with_dense_rows(const torch::stable::Tensor& tensor) {
  return tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// A tensor of shape (B, L, C) like x and of this dtype, as rows whose last dimension is dense; copied if it is not.
inline torch::stable::Tensor token_rows(const char* name, const torch::stable::Tensor& tensor,
                                        const torch::stable::Tensor& x, torch::headeronly::ScalarType dtype) {
  check_like(name, tensor, x, dtype);
  VAR_CHECK(tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1), name, "the shape of x", "(", tensor.size(0),
            ", ", tensor.size(1), ", ", tensor.size(2), ")");
  return with_dense_rows(tensor);
}
inline torch::stable::Tensor token_rows(const char* name, const torch::stable::Tensor& tensor,
                                        const torch::stable::Tensor& x) {
  return token_rows(name, tensor, x, x.scalar_type());
}

// The branch. Its dtype is that of x or, if x is fp32, also one of 16 bits; y has the dtype of the branch.
inline torch::stable::Tensor branch_rows(const torch::stable::Tensor& branch, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = branch.scalar_type();
  const bool mixed =
      x.scalar_type() == ScalarType::Float && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half);
  return token_rows("branch", branch, x, mixed ? dtype : x.scalar_type());
}

// A modulation tensor of shape (B, 1, C), (1, 1, C) or (B, L, C), with a dense last dimension.
inline torch::stable::Tensor modulation_rows(const char* name, const torch::stable::Tensor& tensor,
                                             const torch::stable::Tensor& x) {
  check_like(name, tensor, x, x.scalar_type());
  const int64_t samples = tensor.size(0), tokens = tensor.size(1);
  VAR_CHECK((samples == x.size(0) && (tokens == 1 || tokens == x.size(1))) || (samples == 1 && tokens == 1), name,
            "shape (B, 1, C), (1, 1, C) or (B, L, C)", "(", samples, ", ", tokens, ", ", tensor.size(2), ")");
  return with_dense_rows(tensor);
}

// mean or rstd, which is (B, L) fp32; dense in the result.
inline torch::stable::Tensor statistic(const char* name, const torch::stable::Tensor& tensor,
                                       const torch::stable::Tensor& x) {
  VAR_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float, name, "Float",
            torch::headeronly::toString(tensor.scalar_type()));
  VAR_CHECK(tensor.dim() == 2 && tensor.size(0) == x.size(0) && tensor.size(1) == x.size(1), name, "shape (B, L)",
            tensor.dim(), " dimensions, ", tensor.numel(), " elements");
  return torch::stable::contiguous(tensor);
}

inline Rows rows(const torch::stable::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.size(0) == 1 ? 0 : tensor.stride(0),
          tensor.size(1) == 1 ? 0 : tensor.stride(1)};
}

}  // namespace var_kernels
