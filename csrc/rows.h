// How kernels address (B, L, C) tensors; without torch, for code that is compiled without its headers.
#pragma once
#include <cstdint>

namespace var_kernels {

// Rows of dense elements, addressed by sample and token. A stride is in elements; 0 broadcasts.
struct Rows {
  const void* data;
  int64_t per_sample, per_token;
};

}  // namespace var_kernels
