"""From one packed projection to the operands of attention: unit queries and keys, and the rows of the KV cache.

Next-scale transformers normalise queries and keys per head before attention. With framework calls this takes two norms
in fp32, a product, two conversions and two copies into the cache; the kernels here read qkv once and write each result
once.
"""

import torch

from ._checks import check_same, check_shape, check_tensor, refuse_gradients, same_floats
from .backends import resolve
from .native.library import define, raw_ops, register_fake
from .reference import qk_norm_cache as _reference

# q is (B, L, H, D), dense. The caches are (B, H, L_max, D); their rows start … start + L - 1 are written.
define(
    "_qk_norm_cache(Tensor qkv, Tensor q_factor, Tensor(a!) k_cache, Tensor(b!) v_cache, SymInt start) -> Tensor",
    __name__,
)


@register_fake("_qk_norm_cache")
def _(qkv, q_factor, k_cache, v_cache, start):
    batch, length, _, heads, dim = qkv.shape
    return qkv.new_empty(batch, length, heads, dim)


def qk_norm_cache(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    start: int,
    *,
    q_factor: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Normalises queries and keys of new tokens, and appends keys and values to a preallocated cache, in one pass.

    With q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], for every sample b, token l and head h:

    result[b,h,l,:]          = q[b,l,h,:] / max(|q[b,l,h,:]|, 1e-12) * q_factor[h]
    k_cache[b,h,start+l,:]   = k[b,l,h,:] / max(|k[b,l,h,:]|, 1e-12)
    v_cache[b,h,start+l,:]   = v[b,l,h,:]

    Args:
        qkv: (B, L, 3, H, D), float32, bfloat16 or float16 (float64 is served by the reference); any strides.
        k_cache, v_cache: (B, H, L_max, D), written in place, with the dtype and device of qkv and a dense last
            dimension. All other rows stay as they are.
        start: the row of the first new token, 0 <= start <= L_max - L.
        q_factor: (H,) float32, the factor of each head; VAR's is exp(min(scale_mul, log 100)). None means 1. Beside a
            float64 qkv it may have any supported dtype.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Returns:
        The queries, (B, H, L, D) in the dtype of qkv, stored as (B, L, H, D). Norms are fp32 (fp64 for float64), and
        results are rounded once.

    For inference: there is no gradient. A NaN in q or k makes NaN only in the same row of the same head.

    Raises:
        TypeError: for an argument that is not a tensor, or of an unsupported or different dtype.
        ValueError: for a wrong shape, device, start or backend.
        RuntimeError: if a gradient would be needed.

    Source: query-key normalisation (Henry et al., arXiv 2010.04245) as in VAR (arXiv 2404.02905) and Infinity
    (arXiv 2412.04431).
    """
    alike = same_floats(qkv, k_cache, v_cache)
    if not alike or qkv.dim() != 5:
        check_tensor("qkv", qkv, rank=5)
    batch, length, parts, heads, dim = qkv.shape
    if parts != 3:
        raise ValueError(f"qkv: expected shape (B, L, 3, H, D), got {tuple(qkv.shape)}")
    for argument, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not alike or cache.dim() != 4:
            check_tensor(argument, cache, rank=4)
        samples, cache_heads, rows, cache_dim = cache.shape
        if samples != batch or cache_heads != heads or cache_dim != dim:
            raise ValueError(f"{argument}: expected shape {(batch, heads, 'L_max', dim)}, got {tuple(cache.shape)}")
        if rows < length:
            raise ValueError(f"{argument}: expected at least {length} rows, got {rows}")
        if dim > 1 and cache.stride(3) != 1:
            raise ValueError(f"{argument}: expected a dense last dimension, got strides {cache.stride()}")
    if not alike:
        check_same("qkv", qkv, k_cache=k_cache, v_cache=v_cache)
    most = min(k_cache.shape[2], v_cache.shape[2]) - length
    if isinstance(start, bool) or not isinstance(start, int | torch.SymInt):
        raise TypeError(f"start: expected an integer, got {type(start).__name__}")
    if not 0 <= start <= most:
        raise ValueError(f"start: expected a row in 0 … {most}, got {start}")
    if q_factor is None:
        q_factor = torch.ones(heads, dtype=torch.float32, device=qkv.device)
    else:
        check_tensor("q_factor", q_factor)
        if q_factor.dim() != 1 or q_factor.shape[0] != heads:
            check_shape("q_factor", q_factor, (heads,))
        if q_factor.device != qkv.device:
            raise ValueError(f"q_factor: expected device {qkv.device} like qkv, got {q_factor.device}")
        if q_factor.dtype != torch.float32 and qkv.dtype != torch.float64:
            raise TypeError(f"q_factor: expected torch.float32, got {q_factor.dtype}")
    refuse_gradients("qk_norm_cache", qkv, q_factor, k_cache, v_cache)
    backend = resolve("qk_norm_cache", backend, qkv.device.type, qkv.dtype)
    if qkv.numel() == 0 or backend == "reference":
        return _reference.qk_norm_cache(qkv, k_cache, v_cache, start, q_factor)
    return raw_ops(backend)._qk_norm_cache(qkv, q_factor, k_cache, v_cache, start).transpose(1, 2)
