"""GroupNorm and SiLU: the specification."""

import torch
import torch.nn.functional as F


def group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    """y = GroupNorm(x) and y·sigmoid(y), or y, of x (B, C, H, W); computed in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Channels first: of channels-last images PyTorch's kernel for CPUs computes E[x²] − E[x]² and loses digits.
    image = x.to(wide).contiguous()
    y = F.group_norm(image, groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(y) if silu else y).to(x.dtype)
