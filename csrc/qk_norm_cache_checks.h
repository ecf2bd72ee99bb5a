// The checks of the arguments of qk_norm_cache, for the entry functions of CPU and CUDA, and how kernels address them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "qk_norm_cache.h"

namespace var_kernels {

// The arguments with every pointer except that of q, which the caller allocates. `qkv` has a dense last dimension.
inline QkNormCache check_qk_norm_cache(const torch::stable::Tensor& qkv, const torch::stable::Tensor& q_factor,
                                       const torch::stable::Tensor& k_cache, const torch::stable::Tensor& v_cache,
                                       int64_t start) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = qkv.scalar_type();
  dtype_index("qkv", qkv);
  VAR_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "qkv", "shape (B, L, 3, H, D)", qkv.dim(), " dimensions");
  const int64_t batch = qkv.size(0), length = qkv.size(1), heads = qkv.size(3), dim = qkv.size(4);
  for (const torch::stable::Tensor* cache : {&k_cache, &v_cache}) {
    const char* name = cache == &k_cache ? "k_cache" : "v_cache";
    VAR_CHECK(cache->scalar_type() == dtype, name, torch::headeronly::toString(dtype),
              torch::headeronly::toString(cache->scalar_type()));
    VAR_CHECK(cache->dim() == 4 && cache->size(0) == batch && cache->size(1) == heads && cache->size(3) == dim, name,
              "shape (B, H, L_max, D)", cache->dim(), " dimensions");
    VAR_CHECK(dim <= 1 || cache->stride(3) == 1, name, "a dense last dimension", cache->stride(3));
    VAR_CHECK(start >= 0 && start + length <= cache->size(2), "start", "rows that the caches have", start);
  }
  VAR_CHECK(q_factor.scalar_type() == ScalarType::Float && q_factor.dim() == 1 && q_factor.size(0) == heads &&
                q_factor.is_contiguous(),
            "q_factor", "a dense float32 vector, one for each head", q_factor.numel());
  const auto cache_rows = [&](const torch::stable::Tensor& cache) {
    return CacheRows{cache.mutable_data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
  };
  return {.qkv = qkv.const_data_ptr(), .qkv_sample = qkv.stride(0), .qkv_token = qkv.stride(1),
          .qkv_part = qkv.stride(2), .qkv_head = qkv.stride(3), .q_factor = q_factor.const_data_ptr<float>(),
          .q = nullptr, .k = cache_rows(k_cache), .v = cache_rows(v_cache), .batch = batch, .length = length,
          .heads = heads, .dim = dim, .start = start};
}

}  // namespace var_kernels
