// The entry function of nearest_code on CUDA devices.
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
  // Normalised and centred codes are fp32, so the vectors must be fp32 as well.
  const Tensor z = dense_rows(cosine ? torch::stable::to(z_in, ScalarType::Float) : z_in);
  const Tensor codebook = dense_rows(codebook_in);
  NearestCode arguments = {matrix_of("z", z), matrix_of("codebook", codebook),
                           {best.mutable_data_ptr<int64_t>(), int(z.size(0)), 0}, nullptr, 0, cosine};
  with_dtype(codebook, [&](auto zero) {
    using T = decltype(zero);
    if (cosine) {
      const Tensor codes = normalised_codes<T>(device, arguments.codebook);
      arguments.codebook = matrix_of("codebook", codes);
      return search(device, arguments);
    }
    const Centred from_centre = centred<T>(device, arguments.codebook, arguments.z);
    arguments.codebook = matrix_of("codebook", from_centre.codes);
    arguments.z = matrix_of("z", from_centre.vectors);
    search(device, arguments);
  });
  return best;
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) { m.impl("_nearest_code", TORCH_BOX(&var_kernels::nearest_code)); }
