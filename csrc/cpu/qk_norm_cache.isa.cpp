// Unit queries and keys, and the rows of the KV cache. Memory is the limit: for each token 3·H·D elements are read and
// as many written. A head (256 bytes at D = 64 in fp32) stays in L1 between the sum of its squares and the product.
#include "qk_norm_cache.h"

#include "isa.h"

namespace var_kernels::VAR_ISA {
namespace {

// out = x · factor / max(|x|, 1e-12); all NaN if x contains a NaN.
template <class T>
VAR_INLINE void normalise(const T* x, int64_t dim, float factor, T* out) {
  Vec squares{};
  int64_t d = 0;
  for (; d + kWidth <= dim; d += kWidth) {
    const Vec v = load(x + d);
    squares = v * v + squares;
  }
  if (d < dim) {
    const Vec v = load_tail(x + d, dim - d);
    squares = v * v + squares;
  }
  const float norm = __builtin_sqrtf(reduce_add(squares));
  const Vec scaled = splat(factor / (norm < 1e-12f ? 1e-12f : norm));
  for (d = 0; d + kWidth <= dim; d += kWidth) store(out + d, load(x + d) * scaled);
  if (d < dim) store_tail(out + d, load_tail(x + d, dim - d) * scaled, dim - d);
}

template <class T>
void rows(const QkNormCache& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / a.length, token = row % a.length;
    const T* q = (const T*)a.qkv + sample * a.qkv_sample + token * a.qkv_token;
    T* q_out = (T*)a.q + row * a.heads * a.dim;
    const auto cache_row = [&](const CacheRows& cache) {
      return (T*)cache.data + sample * cache.per_sample + (a.start + token) * cache.per_token;
    };
    T *k_out = cache_row(a.k), *v_out = cache_row(a.v);
    for (int64_t head = 0; head < a.heads; ++head) {
      const T* head_q = q + head * a.qkv_head;
      normalise(head_q, a.dim, a.q_factor[head], q_out + head * a.dim);
      normalise(head_q + a.qkv_part, a.dim, 1.0f, k_out + head * a.k.per_head);
      memcpy(v_out + head * a.v.per_head, head_q + 2 * a.qkv_part, size_t(a.dim) * sizeof(T));
    }
  }
}

}  // namespace

extern const QkNormCacheTable qk_norm_cache_table;
const QkNormCacheTable qk_norm_cache_table = {{rows<float>, rows<bf16>, rows<fp16>}};

}  // namespace var_kernels::VAR_ISA
