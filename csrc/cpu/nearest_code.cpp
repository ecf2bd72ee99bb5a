// The C++ entry of nearest_code on CPUs: checks, the packed codebook, and work over threads.
#include "nearest_code.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../nearest_code_checks.h"
#include "dispatch.h"

namespace var_kernels {

VAR_DECLARE_ISA_TABLES(NearestCodeTable, nearest_code_table)

// Large blocks reuse each strip from L1; about four blocks per thread let the threads finish at the same time.
int64_t nearest_code_task_rows(int64_t rows) {
  constexpr int64_t tile = 6;
  return std::clamp(round_up(rows / (4 * int64_t(torch::stable::get_num_threads())), tile), tile, kNearestCodeRows);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor as dense fp32; the conversion of 16-bit types is exact.
Tensor dense_fp32(const Tensor& tensor) {
  const Tensor wide =
      tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

// z - centre for every row of z, which is dense.
Tensor difference(const Tensor& z, const float* centre) {
  Tensor out = empty_cpu({z.size(0), z.size(1)}, ScalarType::Float);
  std::copy_n(z.const_data_ptr<float>(), z.numel(), out.mutable_data_ptr<float>());
  nearest_code_table().subtract(centre, z.size(0), z.size(1), out.mutable_data_ptr<float>());
  return out;
}

Tensor nearest_code(const Tensor& z_in, const Tensor& codebook_in, bool cosine) {
  check_nearest_code(z_in, codebook_in);
  const int64_t rows = z_in.size(0), channels = z_in.size(1), codes = codebook_in.size(0);
  Tensor best = empty_cpu({rows}, ScalarType::Long);
  if (rows == 0) return best;

  const Tensor z = dense_fp32(z_in), codebook = dense_fp32(codebook_in);
  const NearestCodeTable& table = nearest_code_table();
  const int64_t strips = ceil_div(codes, table.strip), strip_floats = (channels + 1) * table.strip;
  VAR_CHECK(strips <= INT32_MAX, "codebook", "fewer codes", codes);
  float* packed = thread_scratch(strips * strip_floats);
  const float* code_data = codebook.const_data_ptr<float>();
  std::vector<float> centre(channels);
  const bool centred = !cosine && table.find_centre(code_data, codes, channels, centre.data());
  parallel_tasks(strips, codes * channels * kNearestCodePackWork, [&](int64_t strip) {
    table.pack(code_data, codes, channels, centred ? centre.data() : nullptr, cosine, strip,
               packed + strip * strip_floats);
  });

  const int64_t rows_per_task = nearest_code_task_rows(rows);
  const Tensor from_centre = centred ? difference(z, centre.data()) : z;
  const float* z_data = from_centre.const_data_ptr<float>();
  int64_t* out = best.mutable_data_ptr<int64_t>();
  parallel_tasks(ceil_div(rows, rows_per_task), rows * codes * channels, [&](int64_t task) {
    const int64_t begin = task * rows_per_task;
    table.search(z_data + begin * channels, std::min(rows_per_task, rows - begin), channels, packed, strips,
                 out + begin);
  });
  return best;
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) { m.impl("_nearest_code", TORCH_BOX(&var_kernels::nearest_code)); }
