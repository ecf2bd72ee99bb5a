// The checks of the arguments of nearest_code, for the entry functions of CPU and CUDA.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"

namespace var_kernels {

inline void check_nearest_code(const torch::stable::Tensor& z, const torch::stable::Tensor& codebook) {
  VAR_CHECK(z.dim() == 2, "z", "2 dimensions", z.dim());
  VAR_CHECK(codebook.dim() == 2, "codebook", "2 dimensions", codebook.dim());
  VAR_CHECK(codebook.size(1) == z.size(1), "codebook", z.size(1), codebook.size(1), " channels");
  VAR_CHECK(codebook.size(0) > 0, "codebook", "at least one code", codebook.size(0));
  dtype_index("z", z);
  VAR_CHECK(codebook.scalar_type() == z.scalar_type(), "codebook", torch::headeronly::toString(z.scalar_type()),
            torch::headeronly::toString(codebook.scalar_type()));
}

}  // namespace var_kernels
