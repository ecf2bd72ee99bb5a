// The C++ entry of qk_norm_cache on CPUs: checks, allocation, and work over threads.
#include "qk_norm_cache.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../qk_norm_cache_checks.h"
#include "dispatch.h"

namespace var_kernels {

VAR_DECLARE_ISA_TABLES(QkNormCacheTable, qk_norm_cache_table)

namespace {

using torch::stable::Tensor;

Tensor qk_norm_cache(const Tensor& qkv_in, const Tensor& q_factor_in, const Tensor& k_cache, const Tensor& v_cache,
                     int64_t start) {
  const Tensor qkv = qkv_in.dim() == 0 || qkv_in.size(qkv_in.dim() - 1) <= 1 || qkv_in.stride(qkv_in.dim() - 1) == 1
                         ? qkv_in
                         : torch::stable::contiguous(qkv_in);
  const Tensor q_factor = torch::stable::contiguous(q_factor_in);
  QkNormCache arguments = check_qk_norm_cache(qkv, q_factor, k_cache, v_cache, start);
  Tensor q = empty_cpu({arguments.batch, arguments.length, arguments.heads, arguments.dim}, qkv.scalar_type());
  arguments.q = q.mutable_data_ptr();
  const int64_t rows = arguments.batch * arguments.length, elements = arguments.heads * arguments.dim;
  if (rows * elements == 0) return q;

  const auto kernel = qk_norm_cache_table().rows[dtype_index("qkv", qkv)];
  constexpr int64_t kElementsPerTask = 1 << 14, kWorkPerElement = 8;
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / elements);
  parallel_tasks(ceil_div(rows, rows_per_task), rows * elements * kWorkPerElement, [&](int64_t task) {
    kernel(arguments, task * rows_per_task, std::min(rows, (task + 1) * rows_per_task));
  });
  return q;
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) { m.impl("_qk_norm_cache", TORCH_BOX(&var_kernels::qk_norm_cache)); }
