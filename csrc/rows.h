// How kernels address (B, L, C) tensors. The kernels are compiled without torch's headers.
#pragma once
#include <cstdint>

namespace var_kernels {

// Rows of dense elements, addressed by sample and token. Strides are in elements; a stride of 0 broadcasts.
struct Rows {
  const void* data;
  int64_t per_sample, per_token;
};

}  // namespace var_kernels
