// Declarations that the C++ entry of adaln_layer_norm (adaln_layer_norm.cpp) and its vector code
// (adaln_layer_norm.isa.cpp) share.
#pragma once
#include <cstdint>

#include "../rows.h"

namespace var_kernels {

struct AdaLNForward {
  Rows x;             // (B, L, C)
  Rows branch, gate;  // (B, L, C); data is null in both if there is no gated residual
  Rows scale, shift;  // (B or 1, L or 1, C)
  void* residual;     // (B, L, C) dense; null like branch
  void* y;            // (B, L, C) dense, in the dtype of branch
  float* mean;        // (B, L) dense
  float* rstd;        // (B, L) dense
  int64_t length, channels;
  float eps;
  bool stream;  // whether to store residual and y past the caches; their rows then have whole, aligned 64-byte lines
};

// The destination of one of the three modulation gradients. A modulation per token has its gradient written straight to
// the output; otherwise the gradient is summed into rows of fp32 partial sums, which are added up afterwards.
struct ModulationGrad {
  void* per_token;  // (B, L, C) dense, or null
  float* partial;   // (chunks, C) dense, or null
};

struct AdaLNBackward {
  Rows dresidual;      // (B, L, C); data is null if there is no gated residual
  Rows dy;             // (B, L, C)
  Rows x;              // (B, L, C): what was normalised, the saved residual in the gated form
  Rows branch, gate;   // null like dresidual
  Rows scale;          // (B or 1, L or 1, C)
  const float* mean;   // (B, L) dense
  const float* rstd;   // (B, L) dense
  void* dx;            // (B, L, C) dense
  void* dbranch;       // (B, L, C) dense; null like dresidual
  ModulationGrad dgate, dscale, dshift;
  int64_t length, channels;
  bool stream;  // as in AdaLNForward, for dx and dbranch
};

struct AdaLNTable {
  // Computes rows [begin, end) of the B·L rows. `row_copy` is scratch memory for one row in fp32. Indexed by dtype:
  // fp32, bf16, fp16; indices 3 and 4 are fp32 with branch and y in bf16 and fp16.
  void (*forward[5])(const AdaLNForward&, int64_t begin, int64_t end, float* row_copy);
  // Computes tokens [begin, end) of one sample and sums their modulation gradients into row `chunk` of the partial
  // sums.
  void (*backward[3])(const AdaLNBackward&, int64_t sample, int64_t begin, int64_t end, int64_t chunk);
  // out[c] = sum over i of partial[i * channels + c], i ascending, for c in [begin, end).
  void (*sum_partials[3])(const float* partial, int64_t count, int64_t channels, int64_t begin, int64_t end, void* out);
};

}  // namespace var_kernels
