"""Block-causal attention in plain PyTorch: the specification of the kernels. Differentiable, any device, any dtype."""

from collections.abc import Sequence
from itertools import accumulate

import torch


def block_causal_attention(
    q: torch.Tensor,  # (B, H, Lq, D)
    k: torch.Tensor,  # (B, Hkv, Lk, D)
    v: torch.Tensor,  # (B, Hkv, Lk, D)
    scale_lens: Sequence[int],
    softmax_scale: float,
    q_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (B, H, Lq, D) in q's dtype and the log-sum-exp (B, H, Lq), computed in float32 or float64.

    It computes one scale after another. The queries of a scale attend to the keys up to the end of the scale, so an
    invisible key is never read, and there is one (scale x prefix) matrix at a time instead of an L x L matrix.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    qs = q.to(compute) * softmax_scale
    ks, vs = (x.to(compute).repeat_interleave(groups, dim=1) for x in (k, v))
    outs, lses = [], []
    for length, end in zip(scale_lens, accumulate(scale_lens), strict=True):
        rows = slice(max(end - length - q_offset, 0), max(end - q_offset, 0))  # may be empty, or end beyond Lq
        scores = qs[:, :, rows] @ ks[:, :, :end].transpose(-2, -1)
        outs.append(scores.softmax(dim=-1) @ vs[:, :, :end])
        lses.append(scores.logsumexp(dim=-1))
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)
