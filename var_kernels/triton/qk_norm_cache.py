"""Computes unit queries and keys, and the rows of the KV cache, from one packed qkv.

Memory bandwidth is the limit: for each token, 3·H·D elements are read and as many are written. A program takes some
heads of one token. Each head is a row of D values, which stays in registers between the sum of the squares and the
product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import choose
from .launch import launch
from .targets import target_of


@triton.jit
def _scaled(x, factor):
    """x · factor / max(|x|, 1e-12) of each row; a row that contains a NaN becomes NaN."""
    norm = tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True))
    return x * (factor / tl.where(norm < 1e-12, 1e-12, norm))


@triton.jit(do_not_specialize=["length", "heads", "start"])
def qk_norm_cache_rows(
    qkv, q_factor, q, k_cache, v_cache,
    qkv_b, qkv_l, qkv_part, qkv_h, k_b, k_h, k_l, v_b, v_h, v_l, length, heads, start,
    D: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // length, row % length
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    present = head < heads
    mask = present & (column < D)
    source = qkv + sample * qkv_b + token * qkv_l + head * qkv_h + column
    factor = tl.load(q_factor + head, mask=present, other=0.0)

    queries = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    keys = tl.load(source + qkv_part, mask=mask, other=0.0).to(tl.float32)
    values = tl.load(source + 2 * qkv_part, mask=mask, other=0.0)
    tl.store(q + (row * heads + head) * D + column, _scaled(queries, factor).to(q.dtype.element_ty), mask=mask)
    place = start + token
    keys_out = k_cache + sample * k_b + place * k_l + head * k_h + column
    tl.store(keys_out, _scaled(keys, 1.0).to(k_cache.dtype.element_ty), mask=mask)
    tl.store(v_cache + sample * v_b + place * v_l + head * v_h + column, values, mask=mask)


def qk_norm_cache(
    qkv: torch.Tensor, q_factor: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: int
) -> torch.Tensor:
    """The raw operator `_qk_norm_cache`: the queries, (B, L, H, D)."""
    batch, length, _, heads, dim = qkv.shape
    q = qkv.new_empty(batch, length, heads, dim)
    if q.numel() == 0:
        return q
    if dim > 1 and qkv.stride(4) != 1:
        qkv = qkv.contiguous()
    width = triton.next_power_of_2(dim)
    config = choose("qk_norm_cache.qk_norm_cache_rows", target_of(qkv.device), width, qkv.element_size())
    arguments = {"qkv": qkv, "q_factor": q_factor.contiguous(), "q": q, "k_cache": k_cache, "v_cache": v_cache}
    arguments |= dict(zip(("qkv_b", "qkv_l", "qkv_part", "qkv_h"), qkv.stride()[:4], strict=True))
    for name, cache in (("k", k_cache), ("v", v_cache)):
        arguments |= dict(zip((f"{name}_b", f"{name}_h", f"{name}_l"), cache.stride()[:3], strict=True))
    arguments |= {"length": length, "heads": heads, "start": start, "D": dim, "WIDTH": width}
    launch(qk_norm_cache_rows, (batch * length, triton.cdiv(heads, config.tiles["HEADS"])), arguments, config)
    return q
