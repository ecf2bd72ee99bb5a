// Declarations that the C++ entry of qk_norm_cache (qk_norm_cache.cpp) and its vector code (qk_norm_cache.isa.cpp)
// share.
#pragma once
#include "../qk_norm_cache.h"

namespace var_kernels {

struct QkNormCacheTable {
  // Computes tokens [begin, end) of the B·L tokens, all heads. Indexed by dtype: fp32, bf16, fp16.
  void (*rows[3])(const QkNormCache&, int64_t begin, int64_t end);
};

}  // namespace var_kernels
