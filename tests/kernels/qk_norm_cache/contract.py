"""What every backend of qk_norm_cache is held to: inputs, and the results in plain PyTorch."""

import torch
from torch.nn.functional import normalize

from var_kernels.testing import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(batch, length, heads, dim, dtype=torch.float32, rows=None, layout="BHLD"):
    """qkv, q_factor and poisoned caches with room around the new rows."""
    rows = length + 5 if rows is None else rows
    qkv = randn(batch, length, 3, heads, dim, seed=length, dtype=dtype)
    shape = (batch, heads, rows, dim) if layout == "BHLD" else (batch, rows, heads, dim)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    if layout == "BLHD":
        caches = [cache.transpose(1, 2) for cache in caches]
    return qkv, randn(heads, seed=dim).exp(), *caches


def expected(qkv, q_factor):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return normalize(q, dim=-1) * q_factor.to(q.dtype).view(-1, 1, 1), normalize(k, dim=-1), v
