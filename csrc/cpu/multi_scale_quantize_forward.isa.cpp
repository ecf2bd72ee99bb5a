// The vector code of the forward of multi_scale_quantize: layout changes, area pooling, phi, and the residual update.
#include "multi_scale_quantize_map.h"

namespace var_kernels::VAR_ISA {
namespace {

void pack_phi(const float* weight, const float* bias, int64_t channels, float ratio, bool transposed, float* packed) {
  const int64_t padded = round_up(channels, kWidth);
  float* packed_bias = packed + 9 * padded * padded;
  zero(packed, (9 * padded + 2) * padded);
  for (int64_t tap = 0; tap < 9; ++tap) {
    float* matrix = packed + tap * padded * padded;
    const float* source = weight + (transposed ? 8 - tap : tap);
    const int64_t in_stride = (transposed ? channels : 1) * 9, out_stride = (transposed ? 1 : channels) * 9;
    for (int64_t in = 0; in < channels; ++in)
      for (int64_t out = 0; out < channels; ++out)
        matrix[in * padded + out] = ratio * source[in * in_stride + out * out_stride];
  }
  if (!transposed)
    for (int64_t c = 0; c < channels; ++c) packed_bias[c] = ratio * bias[c];
  for (int64_t c = 0; c < channels; ++c) packed_bias[padded + c] = 1.0f - ratio;
}

void load_rows(const MapShape& s, const Image& image, int64_t y0, int64_t y1, float* map) {
  for (int64_t y = y0; y < y1; ++y) {
    float* row = map + y * s.width * s.padded;
    const float* source = image.data + y * image.row_stride;
    if (s.channels < s.padded) zero(row, s.width * s.padded);
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t x = 0; x < s.width; ++x)
        row[x * s.padded + c] = source[c * image.channel_stride + x * image.column_stride];
  }
}

void store_rows(const MapShape& s, const float* map, const Image& image, int64_t y0, int64_t y1, float* out) {
  for (int64_t y = y0; y < y1; ++y) {
    const float* row = map + y * s.width * s.padded;
    const float* source = image.data + y * image.row_stride;
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t x = 0; x < s.width; ++x) {
        const float value = source[c * image.channel_stride + x * image.column_stride];
        out[(c * s.height + y) * s.width + x] = row[x * s.padded + c] + (value - value);
      }
  }
}

// Sums in the order of PyTorch's adaptive average pooling and divides as PyTorch does, so that the means are bit-equal.
void pool(const MapShape& s, const float* map, int64_t height, int64_t width, int64_t first, int64_t count,
          float* out) {
  for (int64_t p = first; p < first + count; ++p, out += s.channels) {
    const int64_t i = p / width, j = p % width;
    const int64_t y0 = i * s.height / height, y1 = ((i + 1) * s.height + height - 1) / height;
    const int64_t x0 = j * s.width / width, x1 = ((j + 1) * s.width + width - 1) / width;
    for (int64_t c = 0; c < s.channels; c += kWidth) {
      Vec sum = {};
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = x0; x < x1; ++x) sum += load(map + (y * s.width + x) * s.padded + c);
      const Vec mean = sum / float(y1 - y0) / float(x1 - x0);
      if (c + kWidth <= s.channels)
        store(out + c, mean);
      else
        store_tail(out + c, mean, s.channels - c);
    }
  }
}

int64_t phi_scratch_floats(const MapShape& s, int64_t rows, int64_t code_pixels) {
  return (rows + 2) * (s.width + 2) * s.padded + upsample_scratch(s, code_pixels);
}

void phi_rows(const MapShape& s, const CodeMap& codes, const float* packed, int64_t y0, int64_t y1, float* scratch,
              float* out, int64_t out_row) {
  const int64_t row = (s.width + 2) * s.padded;
  upsample_rows(s, codes, y0, y1, scratch + (y1 - y0 + 2) * row, scratch);
  for (int64_t y = y0; y < y1; ++y)
    phi_row(s, scratch + (y - y0) * row, packed, out + (y - y0) * out_row);
}

double subtract_rows(const MapShape& s, int64_t rows, const float* h, float* f_hat, float* rest) {
  const int64_t row = s.width * s.padded;
  double total = 0;
  for (int64_t y = 0; y < rows; ++y) {
    Vec squares = {};
    for (int64_t i = y * row; i < (y + 1) * row; i += kWidth) {
      const Vec step = load(h + i), left = load(rest + i) - step;
      store(f_hat + i, load(f_hat + i) + step);
      store(rest + i, left);
      squares += left * left;
    }
    total += reduce_add(squares);
  }
  return total;
}

void add_rows(const MapShape& s, int64_t rows, const float* h, float* map) {
  for (int64_t i = 0; i < rows * s.width * s.padded; i += kWidth) store(map + i, load(map + i) + load(h + i));
}

}  // namespace

extern const QuantizeForwardTable quantize_forward;
const QuantizeForwardTable quantize_forward = {
    kWidth, pack_phi, load_rows, store_rows, pool, phi_rows, phi_scratch_floats, subtract_rows, add_rows,
};

}  // namespace var_kernels::VAR_ISA
