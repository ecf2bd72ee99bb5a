// The checks of the arguments of block_causal_attention, for the entry functions of CPU and CUDA.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"

namespace var_kernels {

// Checks that x is (B, heads, length, D) with the batch, D and dtype of q, and that its last dimension is dense.
inline void check_attention_tensor(const char* name, const torch::stable::Tensor& x, const torch::stable::Tensor& q,
                                   int64_t heads, int64_t length) {
  VAR_CHECK(x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == heads && x.size(2) == length &&
                x.size(3) == q.size(3),
            name, shape_text({q.size(0), heads, length, q.size(3)}), shape_text(x));
  VAR_CHECK(x.scalar_type() == q.scalar_type(), name, torch::headeronly::toString(q.scalar_type()),
            torch::headeronly::toString(x.scalar_type()));
  VAR_CHECK(x.size(3) == 1 || x.stride(3) == 1 || x.numel() == 0, name, "a dense last dimension", "stride ",
            x.stride(3));
}

// The log-sum-exp or its gradient, which is (B, H, Lq) in float32. A tensor that is not dense is copied.
inline torch::stable::Tensor checked_statistics(const char* name, const torch::stable::Tensor& x,
                                                const torch::stable::Tensor& q) {
  using torch::headeronly::ScalarType;
  VAR_CHECK(x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == q.size(2), name,
            shape_text({q.size(0), q.size(1), q.size(2)}), shape_text(x));
  VAR_CHECK(x.scalar_type() == ScalarType::Float, name, "Float", torch::headeronly::toString(x.scalar_type()));
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// The lengths of the scales: `scale_lens`, or the elements of `lens`, which compiled code passes instead.
inline std::vector<int64_t> lengths_of(const std::vector<int64_t>& scale_lens,
                                       const std::optional<torch::stable::Tensor>& lens) {
  if (!lens) return scale_lens;
  VAR_CHECK(lens->scalar_type() == torch::headeronly::ScalarType::Long, "scale_lens", "int64",
            torch::headeronly::toString(lens->scalar_type()));
  VAR_CHECK(lens->is_cpu() && lens->dim() == 1, "scale_lens", "1 dimension, on the CPU", shape_text(*lens));
  VAR_CHECK(scale_lens.empty(), "scale_lens", "no ints beside a tensor", scale_lens.size());
  std::vector<int64_t> lengths(lens->size(0));
  const int64_t* data = static_cast<const int64_t*>(lens->const_data_ptr());
  for (size_t k = 0; k < lengths.size(); ++k) lengths[k] = data[int64_t(k) * lens->stride(0)];
  return lengths;
}

inline void check_attention(const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                            const torch::stable::Tensor& v, const std::vector<int64_t>& scale_lens, int64_t q_offset) {
  VAR_CHECK(q.dim() == 4, "q", "4 dimensions", q.dim());
  VAR_CHECK(k.dim() == 4, "k", "4 dimensions", k.dim());
  dtype_index("q", q);
  const int64_t heads = q.size(1), queries = q.size(2), dim = q.size(3), kv_heads = k.size(1), keys = k.size(2);
  VAR_CHECK(dim >= 1 && dim <= 256, "q", "a head dimension from 1 to 256", dim);
  VAR_CHECK(kv_heads > 0 && heads % kv_heads == 0, "k", "a number of heads that divides that of q", kv_heads);
  check_attention_tensor("q", q, q, heads, queries);
  check_attention_tensor("k", k, q, kv_heads, keys);
  check_attention_tensor("v", v, q, kv_heads, keys);
  int64_t sum = 0;
  for (const int64_t length : scale_lens) {
    VAR_CHECK(length > 0, "scale_lens", "lengths > 0", length);
    sum += length;
  }
  VAR_CHECK(sum == keys, "scale_lens", "lengths that sum to " + std::to_string(keys), sum);
  VAR_CHECK(q_offset >= 0 && q_offset + queries <= keys, "q_offset", "0 to " + std::to_string(keys - queries),
            q_offset);
}

}  // namespace var_kernels
