// The C++ entry of multi_scale_quantize and next_scale_input on CPUs: checks, allocation, and the order of the work.
//
// The scales are sequential. Inside a scale there are two rounds of independent tasks over a group of images. The first
// pools and searches; its tasks are runs of tokens, which may cross images, so that the one-token scale of eight images
// is one block of eight rows. The second computes phi and the residual, in bands of rows. Each task writes its own
// outputs, and every sum has a fixed order.
#include <tuple>

#include "multi_scale_quantize_plan.h"

namespace var_kernels {
namespace {

using namespace multi_scale;

// Rows of the map in one phi task. A band needs two extra rows of upsampling, which at 16×16×32 cost about 1 % of its
// time, and one image still keeps four threads busy.
constexpr int64_t kBandRows = 4;
// How many images are processed together: enough to give the threads tasks, and few enough to stay in a shared cache.
constexpr int64_t kGroupImages = 8;

int64_t bands_of(const MapShape& shape) { return ceil_div(shape.height, kBandRows); }
int64_t phi_work(const MapShape& shape) { return shape.height * shape.width * shape.padded * shape.padded * 9; }

struct Quantizer {
  const QuantizeForwardTable& table = quantize_forward();
  const NearestCodeTable& nearest = nearest_code_table();
  const Tensor& f;
  MapShape shape;
  const Schedule& schedule;
  const float* codebook;       // (codes, channels)
  int64_t codes;
  const float* packed_codes;   // (strips, strip_floats)
  const float* centre;         // what was subtracted from the packed codes (channels), or null
  const float* packed_phi;     // (n, phi_floats)
  const Sizes& phi_index;
  float *f_hat, *rest;         // maps of a group
  int64_t* tokens;             // (batch, schedule.tokens)
  double* errors;              // (batch, scales, bands)

  int64_t strips() const { return ceil_div(codes, nearest.strip); }

  // Pools and searches: computes the tokens of scale k of images [first, first + count).
  void search(int64_t k, int64_t first, int64_t count) const {
    const Scale& scale = schedule.scales[k];
    const int64_t rows = count * scale.tokens(), block = nearest_code_task_rows(rows);
    parallel_tasks(ceil_div(rows, block), rows * codes * shape.channels, [&](int64_t task) {
      const int64_t begin = task * block, end = std::min(begin + block, rows);
      float* pooled = thread_scratch(block * shape.channels);
      int64_t best[kNearestCodeRows];
      for (int64_t row = begin; row < end;) {
        const int64_t image = row / scale.tokens(), token = row % scale.tokens();
        const int64_t run = std::min(end - row, scale.tokens() - token);
        table.pool(shape, rest + image * map_floats(shape), scale.height, scale.width, token, run,
                   pooled + (row - begin) * shape.channels);
        row += run;
      }
      if (centre != nullptr) nearest.subtract(centre, end - begin, shape.channels, pooled);
      nearest.search(pooled, end - begin, shape.channels, packed_codes, strips(), best);
      for (int64_t row = begin; row < end; ++row)
        tokens[(first + row / scale.tokens()) * schedule.tokens + scale.offset + row % scale.tokens()] =
            best[row - begin];
    });
  }

  // Updates f_hat and rest after scale k.
  void update(int64_t k, int64_t first, int64_t count) const {
    const Scale& scale = schedule.scales[k];
    const int64_t bands = bands_of(shape), row = shape.width * shape.padded, scales = schedule.scales.size();
    const int64_t scratch = table.phi_scratch_floats(shape, kBandRows, scale.tokens());
    parallel_tasks(count * bands, count * phi_work(shape), [&](int64_t task) {
      const int64_t image = task / bands, band = task % bands;
      const int64_t y0 = band * kBandRows, y1 = std::min(y0 + kBandRows, shape.height);
      const int64_t* scale_tokens = tokens + (first + image) * schedule.tokens + scale.offset;
      float* h = thread_scratch(kBandRows * row + scratch);
      table.phi_rows(shape, scale.codes(codebook, shape.channels, scale_tokens),
                     packed_phi + phi_index[k] * phi_floats(shape), y0, y1, h + kBandRows * row, h, row);
      const int64_t at = image * map_floats(shape) + y0 * row;
      errors[((first + image) * scales + k) * bands + band] =
          table.subtract_rows(shape, y1 - y0, h, f_hat + at, rest + at);
    });
  }

  void load(int64_t first, int64_t count) const {
    parallel_tasks(count, count * map_floats(shape), [&](int64_t image) {
      table.load_rows(shape, image_of(f, first + image), 0, shape.height, rest + image * map_floats(shape));
      std::fill_n(f_hat + image * map_floats(shape), map_floats(shape), 0.0f);
    });
  }

  void store(int64_t first, int64_t count, float* out) const {
    parallel_tasks(count, count * map_floats(shape), [&](int64_t image) {
      table.store_rows(shape, f_hat + image * map_floats(shape), image_of(f, first + image), 0, shape.height,
                       out + (first + image) * shape.channels * shape.height * shape.width);
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> quantize(const Tensor& f, const Tensor& codebook_in, const Tensor& phi_weight_in,
                                            const Tensor& phi_bias_in, Sizes heights, Sizes widths, Sizes phi_index,
                                            double phi_ratio, bool cosine) {
  const MapShape shape = map_shape(f, "f");
  const Schedule schedule = make_schedule(shape, heights, widths);
  const int64_t batch = f.size(0), scales = schedule.scales.size(), convolutions = phi_weight_in.size(0);
  check_codebook(codebook_in, shape.channels);
  check_phi(phi_weight_in, phi_bias_in, shape.channels);
  check_phi_index(phi_index, scales, convolutions);
  const Tensor codebook = dense(codebook_in), phi_weight = dense(phi_weight_in), phi_bias = dense(phi_bias_in);
  Tensor tokens = empty_cpu({batch, schedule.tokens}, ScalarType::Long);
  Tensor f_hat = empty_map(f);
  Tensor errors = empty_cpu({batch, scales}, ScalarType::Float);
  if (batch == 0) return {tokens, f_hat, errors};

  const QuantizeForwardTable& table = quantize_forward();
  const NearestCodeTable& nearest = nearest_code_table();
  const int64_t codes = codebook.size(0), strips = ceil_div(codes, nearest.strip);
  VAR_CHECK(strips <= INT32_MAX, "codebook", "fewer codes", codes);
  const int64_t strip_floats = (shape.channels + 1) * nearest.strip, bands = bands_of(shape);
  const int64_t group = std::min(batch, std::max<int64_t>(kGroupImages, 2 * torch::stable::get_num_threads()));
  const Tensor packed_codes = workspace(strips * strip_floats);
  const Tensor packed_phi = workspace(convolutions * phi_floats(shape));
  const Tensor maps = workspace(2 * group * map_floats(shape));
  std::vector<double> partial_errors(batch * scales * bands);
  float* strip_data = packed_codes.mutable_data_ptr<float>();
  float* phi_data = packed_phi.mutable_data_ptr<float>();
  float* map_data = maps.mutable_data_ptr<float>();
  const float* codebook_data = codebook.const_data_ptr<float>();
  std::vector<float> centre_data(shape.channels);
  const bool centred = !cosine && nearest.find_centre(codebook_data, codes, shape.channels, centre_data.data());
  const float* centre = centred ? centre_data.data() : nullptr;

  const int64_t work = codes * shape.channels * kNearestCodePackWork + phi_weight.numel();
  parallel_tasks(strips + convolutions, work, [&](int64_t task) {
    const int64_t strip = task - convolutions, weights = shape.channels * shape.channels * 9;
    if (strip >= 0)
      nearest.pack(codebook_data, codes, shape.channels, centre, cosine, strip, strip_data + strip * strip_floats);
    else
      table.pack_phi(phi_weight.const_data_ptr<float>() + task * weights,
                     phi_bias.const_data_ptr<float>() + task * shape.channels, shape.channels, float(phi_ratio),
                     false, phi_data + task * phi_floats(shape));
  });
  const Quantizer quantizer{.f = f, .shape = shape, .schedule = schedule, .codebook = codebook_data, .codes = codes,
                            .packed_codes = strip_data, .centre = centre, .packed_phi = phi_data, .phi_index = phi_index,
                            .f_hat = map_data, .rest = map_data + group * map_floats(shape),
                            .tokens = tokens.mutable_data_ptr<int64_t>(), .errors = partial_errors.data()};
  for (int64_t first = 0; first < batch; first += group) {
    const int64_t count = std::min(group, batch - first);
    quantizer.load(first, count);
    for (int64_t k = 0; k < scales; ++k) {
      quantizer.search(k, first, count);
      quantizer.update(k, first, count);
    }
    quantizer.store(first, count, f_hat.mutable_data_ptr<float>());
  }
  float* error_data = errors.mutable_data_ptr<float>();
  for (int64_t i = 0; i < batch * scales; ++i) {
    double sum = 0;
    for (int64_t band = 0; band < bands; ++band) sum += partial_errors[i * bands + band];
    error_data[i] = float(sum);
  }
  return {tokens, f_hat, errors};
}

std::tuple<Tensor, Tensor> next_scale_input(const Tensor& f_hat, const Tensor& codes_in, const Tensor& phi_weight_in,
                                            const Tensor& phi_bias_in, int64_t phi_index, int64_t height,
                                            int64_t width, int64_t next_height, int64_t next_width,
                                            double phi_ratio) {
  const MapShape shape = map_shape(f_hat, "f_hat");
  const int64_t batch = f_hat.size(0), channels = shape.channels;
  check_step(codes_in, batch, channels, height, width, next_height, next_width);
  check_phi(phi_weight_in, phi_bias_in, channels);
  check_phi_index({phi_index}, 1, phi_weight_in.size(0));
  const Tensor codes = channels == 1 || codes_in.stride(2) == 1 ? codes_in : torch::stable::contiguous(codes_in);
  const Tensor phi_weight = dense(phi_weight_in), phi_bias = dense(phi_bias_in);
  const int64_t next_tokens = next_height * next_width;
  Tensor out = empty_map(f_hat);
  Tensor next = empty_cpu({batch, next_tokens, channels}, ScalarType::Float);
  if (batch == 0) return {out, next};

  const QuantizeForwardTable& table = quantize_forward();
  const Scale scale = make_scale(shape, height, width, 0);
  const Tensor memory = workspace(phi_floats(shape) + batch * map_floats(shape));
  float* packed_phi = memory.mutable_data_ptr<float>();
  float* maps = packed_phi + phi_floats(shape);
  table.pack_phi(phi_weight.const_data_ptr<float>() + phi_index * channels * channels * 9,
                 phi_bias.const_data_ptr<float>() + phi_index * channels, channels, float(phi_ratio), false,
                 packed_phi);
  const int64_t bands = bands_of(shape), row = shape.width * shape.padded;
  const int64_t scratch = table.phi_scratch_floats(shape, kBandRows, scale.tokens());
  parallel_tasks(batch * bands, batch * phi_work(shape), [&](int64_t task) {
    const int64_t image = task / bands, y0 = task % bands * kBandRows, y1 = std::min(y0 + kBandRows, shape.height);
    const Image source = image_of(f_hat, image);
    float* h = thread_scratch(kBandRows * row + scratch);
    float* map = maps + image * map_floats(shape);
    table.phi_rows(shape, scale.codes(codes.const_data_ptr<float>() + image * codes.stride(0), codes.stride(1), nullptr),
                   packed_phi, y0, y1, h + kBandRows * row, h, row);
    table.load_rows(shape, source, y0, y1, map);
    table.add_rows(shape, y1 - y0, h, map + y0 * row);
    table.store_rows(shape, map, source, y0, y1,
                     out.mutable_data_ptr<float>() + image * channels * shape.height * shape.width);
  });
  if (next_tokens > 0)
    parallel_tasks(batch, batch * map_floats(shape), [&](int64_t image) {
      table.pool(shape, maps + image * map_floats(shape), next_height, next_width, 0, next_tokens,
                 next.mutable_data_ptr<float>() + image * next_tokens * channels);
    });
  return {out, next};
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) {
  m.impl("_multi_scale_quantize", TORCH_BOX(&var_kernels::quantize));
  m.impl("_next_scale_input", TORCH_BOX(&var_kernels::next_scale_input));
}
