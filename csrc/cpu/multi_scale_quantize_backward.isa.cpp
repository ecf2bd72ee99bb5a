// The vector code of the backward of multi_scale_quantize.
//
// The error of scale k is |f_hat_k - f|² with f_hat_k = h_0 + … + h_k, so the gradient of h_k is the sum of all error
// gradients from k on. From there every scale is differentiated by itself: bias and weight of phi, the adjoint
// convolution, the adjoint of the bicubic upsampling, the rows of the codebook.
#include "multi_scale_quantize_map.h"

namespace var_kernels::VAR_ISA {
namespace {

// The number of pixels of S and of u that the weight gradient reads nine times from L1.
constexpr int64_t kPixelsInL1 = 128;

void suffix_sums(const MapShape& s, const Image& f, int64_t y, int64_t scales, const float* factors, float* maps,
                 float* error, float* df) {
  const int64_t row = s.width * s.padded, map_floats = (s.height + 2) * (s.width + 2) * s.padded;
  float* rows = maps + ((y + 1) * (s.width + 2) + 1) * s.padded;
  const float* source = f.data + y * f.row_stride;
  zero(error, row);
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t x = 0; x < s.width; ++x)
      error[x * s.padded + c] = -source[c * f.channel_stride + x * f.column_stride];
  for (int64_t i = 0; i < row; i += kWidth) {
    Vec difference = load(error + i), sum = {};
    for (int64_t k = 0; k < scales; ++k) {
      float* h = rows + k * map_floats + i;
      difference += load(h);
      store(h, difference * factors[k]);
    }
    for (int64_t k = scales - 1; k >= 0; --k) {
      float* g = rows + k * map_floats + i;
      sum += load(g);
      store(g, sum);
    }
  }
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t x = 0; x < s.width; ++x) df[(c * s.height + y) * s.width + x] = -rows[x * s.padded + c];
}

// dweight[tap] (in, out) = the sum over pixels of u[pixel + tap] (in) · S[pixel] (out). The sum runs over several rows
// at once, across the borders between them, where S is zero.
void weight_gradient(const MapShape& s, const float* u, const float* gradient, bool accumulate, float* dweight) {
  const int64_t row = s.width + 2, first = row + 1, end = s.height * row + s.width + 1;
  for (int64_t begin = first; begin < end; begin += kPixelsInL1) {
    const int64_t pixels = min_i(kPixelsInL1, end - begin);
    for (int64_t tap = 0; tap < 9; ++tap) {
      const int64_t neighbour = begin + (tap / 3 - 1) * row + tap % 3 - 1;
      gemm(s.channels, s.padded, pixels, u + neighbour * s.padded, 1, s.padded, gradient + begin * s.padded, s.padded,
           dweight + tap * s.channels * s.padded, s.padded, accumulate || begin > first);
    }
  }
}

void bias_gradient(const MapShape& s, const float* gradient, bool accumulate, float* dbias) {
  if (!accumulate) zero(dbias, s.padded);
  for (int64_t c = 0; c < s.padded; c += kWidth) {
    for (int64_t y = 1; y <= s.height; ++y) {
      Vec sum = {};
      for (int64_t x = 1; x <= s.width; ++x) sum += load(gradient + (y * (s.width + 2) + x) * s.padded + c);
      store(dbias + c, load(dbias + c) + sum);
    }
  }
}

VAR_INLINE void add_scaled(const float* p, float weight, int64_t floats, float* sum) {
  for (int64_t c = 0; c < floats; c += kWidth) store(sum + c, load(sum + c) + load(p + c) * weight);
}

int64_t scratch_floats(const MapShape& s, int64_t code_pixels) {
  const int64_t u = (s.height + 2) * (s.width + 2) * s.padded, du_row = s.width * s.padded;
  return u + max_i(upsample_scratch(s, code_pixels), du_row + code_pixels * s.padded);
}

void phi_backward(const MapShape& s, const CodeMap& codes, const float* packed_adjoint, const float* gradient,
                  float* scratch, bool accumulate, float* dweight, float* dbias, float* dcodes) {
  float* u = scratch;
  float* du_row = scratch + (s.height + 2) * (s.width + 2) * s.padded;
  float* line = du_row + s.width * s.padded;
  upsample_rows(s, codes, 0, s.height, du_row, u);
  weight_gradient(s, u, gradient, accumulate, dweight);
  bias_gradient(s, gradient, accumulate, dbias);
  if (codes.vertical) zero(dcodes, codes.height * codes.width * s.padded);
  for (int64_t y = 0; y < s.height; ++y) {
    const int64_t code_row = codes.width * s.padded;
    float* out = codes.vertical ? du_row : dcodes + y * code_row;
    phi_row(s, gradient + y * (s.width + 2) * s.padded, packed_adjoint, out);
    if (!codes.vertical) continue;
    zero(line, code_row);
    for (int64_t x = 0; x < s.width; ++x)
      for (int t = 0; t < 4; ++t)
        add_scaled(du_row + x * s.padded, codes.horizontal[x].weight[t], s.padded,
                   line + codes.horizontal[x].index[t] * s.padded);
    for (int t = 0; t < 4; ++t)
      add_scaled(line, codes.vertical[y].weight[t], code_row, dcodes + codes.vertical[y].index[t] * code_row);
  }
}

void scatter_add(const MapShape& s, const int64_t* tokens, int64_t count, const float* dcodes, int64_t first,
                 int64_t end, float* dcodebook) {
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < first || tokens[i] >= end) continue;
    float* sum = dcodebook + tokens[i] * s.channels;
    const float* part = dcodes + i * s.padded;
    int64_t c = 0;
    for (; c + kWidth <= s.channels; c += kWidth) store(sum + c, load(sum + c) + load(part + c));
    for (; c < s.channels; ++c) sum[c] += part[c];
  }
}

void add(const float* part, int64_t count, float* sum) { add_scaled(part, 1.0f, count, sum); }

}  // namespace

extern const QuantizeBackwardTable quantize_backward;
const QuantizeBackwardTable quantize_backward = {
    suffix_sums, phi_backward, scratch_floats, scatter_add, add,
};

}  // namespace var_kernels::VAR_ISA
