// Declarations that the C++ entry of sample_tokens (sample_tokens.cpp) and its vector code (sample_tokens.isa.cpp)
// share.
#pragma once
#include "../sample_tokens.h"

namespace var_kernels {

// The floats of scratch memory for a row: its logits and its probabilities, in whole blocks of 64.
constexpr int64_t sample_tokens_scratch(int64_t vocab) { return 2 * ((vocab + 63) / 64 * 64); }

struct SampleTokensTable {
  // Computes the token of row `row` of the B·L rows. Indexed by dtype: fp32, bf16, fp16.
  void (*row[3])(const SampleTokens&, int64_t row, float* scratch);
};

}  // namespace var_kernels
