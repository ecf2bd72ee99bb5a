// The door of nearest_code on CUDA devices.
#include "nearest_code_launch.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../nearest_code_checks.h"

namespace var_kernels {
namespace {

Tensor dense_rows(const Tensor& x) {
  return x.size(1) == 1 || x.stride(1) == 1 || x.numel() == 0 ? x : torch::stable::contiguous(x);
}

Matrix matrix_of(const char* name, const Tensor& x) {
  VAR_CHECK(x.size(0) <= kMostRows && x.size(1) <= kMostRows, name, "at most 2^30 rows and columns",
            x.size(0) > kMostRows ? x.size(0) : x.size(1));
  return {x.const_data_ptr(), x.size(0) > 1 ? x.stride(0) : 0, int(x.size(0)), int(x.size(1))};
}

Tensor nearest_code(const Tensor& z_in, const Tensor& codebook_in, bool cosine) {
  check_nearest_code(z_in, codebook_in);
  const OnDevice device(z_in);
  Tensor best = device.empty({z_in.size(0)}, ScalarType::Long);
  if (z_in.size(0) == 0) return best;
  const Tensor z = dense_rows(z_in), codebook = dense_rows(codebook_in);
  const NearestCode arguments = {matrix_of("z", z), matrix_of("codebook", codebook),
                                 {best.mutable_data_ptr<int64_t>(), int(z.size(0)), 0}, nullptr, 0, cosine};
  switch (z.scalar_type()) {
    case ScalarType::Float: search<float>(device, arguments); break;
    case ScalarType::BFloat16: search<bf16>(device, arguments); break;
    default: search<fp16>(device, arguments);
  }
  return best;
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) { m.impl("_nearest_code", TORCH_BOX(&var_kernels::nearest_code)); }
