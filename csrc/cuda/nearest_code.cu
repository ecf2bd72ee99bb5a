// The launcher and the door of nearest_code on CUDA devices.
#include "nearest_code.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../nearest_code_checks.h"
#include "launch.h"
#include "search_splits.h"

namespace var_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor dense_rows(const Tensor& x) {
  return x.size(1) == 1 || x.stride(1) == 1 || x.numel() == 0 ? x : torch::stable::contiguous(x);
}

Matrix matrix_of(const char* name, const Tensor& x) {
  VAR_CHECK(x.size(0) <= kMostRows && x.size(1) <= kMostRows, name, "at most 2^30 rows and columns",
            x.size(0) > kMostRows ? x.size(0) : x.size(1));
  return {x.const_data_ptr(), x.size(0) > 1 ? x.stride(0) : 0, int(x.size(0)), int(x.size(1))};
}

// Whether rows of fp32 consist of aligned pieces of 16 bytes.
bool vectors_fit(const Matrix& matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && matrix.stride % 4 == 0 && matrix.channels % 4 == 0;
}

template <class T, bool kVectors>
void search(const OnDevice& device, NearestCode arguments) {
  with_thread_rows(arguments.z.rows, [&](auto thread_rows) {
    constexpr int kThreadRows = decltype(thread_rows)::value;
    using Tile = NearestTile<kThreadRows>;
    const int rows = arguments.z.rows;
    const SearchSplits splits =
        search_splits((rows + Tile::kRows - 1) / Tile::kRows, arguments.codebook.rows, Tile::kCodes, device);
    arguments.split_codes = splits.codes;
    Tensor candidates = splits.memory(device, rows);
    arguments.candidates = reinterpret_cast<Candidate*>(candidates.mutable_data_ptr<float>());
    const LaunchShape shape = {dim3(unsigned((rows + Tile::kRows - 1) / Tile::kRows), unsigned(splits.count)),
                               dim3(kSearchThreads), nearest_code_shared_bytes<Tile>(arguments.z.channels)};
    launch(device, "nearest_code", nearest_code_kernel<T, kVectors, kThreadRows>, shape, arguments);
    if (splits.count > 1)
      launch(device, "nearest_code splits", best_candidate_kernel,
             {dim3(unsigned((rows + kSearchThreads - 1) / kSearchThreads)), dim3(kSearchThreads)},
             arguments.candidates, splits.count, rows, arguments.best);
  });
}

Tensor nearest_code(const Tensor& z_in, const Tensor& codebook_in, bool cosine) {
  check_nearest_code(z_in, codebook_in);
  const OnDevice device(z_in);
  Tensor best = device.empty({z_in.size(0)}, ScalarType::Long);
  if (z_in.size(0) == 0) return best;
  const Tensor z = dense_rows(z_in), codebook = dense_rows(codebook_in);
  const NearestCode arguments = {matrix_of("z", z), matrix_of("codebook", codebook), best.mutable_data_ptr<int64_t>(),
                                 nullptr, 0, cosine};
  switch (z.scalar_type()) {
    case ScalarType::Float:
      vectors_fit(arguments.z) && vectors_fit(arguments.codebook) ? search<float, true>(device, arguments)
                                                                  : search<float, false>(device, arguments);
      break;
    case ScalarType::BFloat16: search<bf16, false>(device, arguments); break;
    default: search<fp16, false>(device, arguments);
  }
  return best;
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) { m.impl("_nearest_code", TORCH_BOX(&var_kernels::nearest_code)); }
