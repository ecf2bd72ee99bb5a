"""GroupNorm and SiLU: the specification."""

import torch
import torch.nn.functional as F


def group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool
) -> torch.Tensor:
    """y·sigmoid(y) of y = GroupNorm(x), or y itself, for x (B, C, H, W), in fp32 (fp64 for fp64), rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # The image has its channels first, because PyTorch's CPU kernel for channels-last images computes E[x²] − E[x]² and
    # loses digits.
    image = x.to(wide).contiguous()
    y = F.group_norm(image, groups, weight.to(wide), bias.to(wide), eps)
    return (F.silu(y) if silu else y).to(x.dtype)
