// The launcher and the entry function of qk_norm_cache on CUDA devices.
#include "qk_norm_cache.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../qk_norm_cache_checks.h"
#include "launch.h"

namespace var_kernels {
namespace {

using torch::stable::Tensor;

bool packs_fit(const QkNormCache& a, int64_t width) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  bool fit = a.dim % width == 0 && a.dim <= 64 * width && aligned(a.qkv) && aligned(a.q);
  for (int64_t stride : {a.qkv_sample, a.qkv_token, a.qkv_part, a.qkv_head}) fit &= stride % width == 0;
  for (const CacheRows* cache : {&a.k, &a.v})
    fit &= aligned(cache->data) && cache->per_sample % width == 0 && cache->per_head % width == 0 &&
           cache->per_token % width == 0;
  return fit;
}

template <class T>
void run(const OnDevice& device, const QkNormCache& a) {
  const int64_t heads = a.batch * a.length * a.heads, packs = a.dim / kPackWidth<T>;
  const bool fit = packs_fit(a, kPackWidth<T>);
  int lanes = 32;
  while (fit && lanes / 2 >= packs) lanes /= 2;
  const int64_t blocks = (heads * lanes + kQkNormThreads - 1) / kQkNormThreads;
  VAR_CHECK(heads <= INT32_MAX / 2 && a.dim <= INT32_MAX, "qkv", "less than 2^30 heads of all tokens", heads);
  const LaunchShape shape = {dim3(unsigned(blocks)), dim3(kQkNormThreads)};
  if (!fit)
    launch(device, "qk_norm_cache", plain_qk_norm_cache_kernel<T>, shape, a);
  else
    launch(device, "qk_norm_cache", packs > 32 ? qk_norm_cache_kernel<T, 2> : qk_norm_cache_kernel<T, 1>, shape, a, lanes);
}

Tensor qk_norm_cache(const Tensor& qkv_in, const Tensor& q_factor_in, const Tensor& k_cache, const Tensor& v_cache,
                     int64_t start) {
  VAR_CHECK(qkv_in.dim() == 5, "qkv", "shape (B, L, 3, H, D)", qkv_in.dim(), " dimensions");
  const OnDevice device(qkv_in);
  const Tensor qkv = qkv_in.size(4) <= 1 || qkv_in.stride(4) == 1 ? qkv_in : torch::stable::contiguous(qkv_in);
  const Tensor q_factor = torch::stable::contiguous(q_factor_in);
  QkNormCache arguments = check_qk_norm_cache(qkv, q_factor, k_cache, v_cache, start);
  Tensor q = device.empty({arguments.batch, arguments.length, arguments.heads, arguments.dim}, qkv.scalar_type());
  arguments.q = q.mutable_data_ptr();
  if (q.numel() == 0) return q;
  with_dtype(qkv, [&](auto zero) { run<decltype(zero)>(device, arguments); });
  return q;
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) { m.impl("_qk_norm_cache", TORCH_BOX(&var_kernels::qk_norm_cache)); }
