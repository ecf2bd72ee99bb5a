"""L2-normalised queries and keys, written into a KV cache: the specification."""

import torch
from torch.nn.functional import normalize


def qk_norm_cache(
    qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, start: int, q_factor: torch.Tensor
) -> torch.Tensor:
    """The queries (B, H, L, D), unit vectors times a factor per head; writes unit keys and values into the caches."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    end = start + qkv.shape[1]
    k_cache[:, :, start:end] = normalize(k.to(wide), dim=-1, eps=1e-12)
    v_cache[:, :, start:end] = v
    return (normalize(q.to(wide), dim=-1, eps=1e-12) * q_factor.to(wide).view(-1, 1, 1)).to(qkv.dtype)
