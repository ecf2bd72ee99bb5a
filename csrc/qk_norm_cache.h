// The arguments of qk_norm_cache as the kernels see them. The kernels are compiled without torch's headers.
#pragma once
#include <cstdint>

namespace var_kernels {

// Rows of a cache (B, H, L_max, D) with a dense last dimension; strides in elements.
struct CacheRows {
  void* data;
  int64_t per_sample, per_head, per_token;
};

struct QkNormCache {
  const void* qkv;  // (B, L, 3, H, D), a dense last dimension; strides in elements
  int64_t qkv_sample, qkv_token, qkv_part, qkv_head;
  const float* q_factor;  // (H)
  void* q;                // (B, L, H, D) dense
  CacheRows k, v;
  int64_t batch, length, heads, dim, start;
};

}  // namespace var_kernels
