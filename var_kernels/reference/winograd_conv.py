"""A 3×3 convolution of an image that may first be doubled in size: the specification."""

import torch
import torch.nn.functional as F


def winograd_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor | None, doubling: bool
) -> torch.Tensor:
    """conv(x, weight) + bias [+ residual], padded by one zero, in the dtype of x; PyTorch sums in fp32 at least.

    With `doubling`, x (B, C, H, W) is first doubled in height and width by nearest neighbour.
    """
    if doubling:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
    y = F.conv2d(x, weight, bias, padding=1)
    return y if residual is None else y + residual
