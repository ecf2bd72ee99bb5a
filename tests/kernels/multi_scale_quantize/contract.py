"""Shapes and inputs that the tests of the multi-scale quantizer share."""

import torch

from var_kernels.testing import randn

NAMES = ("f", "codebook", "phi_weight", "phi_bias")

# (batch, channels, codes, convolutions, maps). Channels straddle the vectors of every ISA level (4, 8, 16) and the
# column strips of the matrix product (16, 32, 64); heights straddle the bands of four rows, widths the register tile of
# six pixels; batches straddle the slots of eight images of the backward; maps are square and not, taller than wide,
# as large as the full map in the middle of the schedule, larger than it along one axis, and a single one. Several
# images where maps are small: the codes of scale 0 are constant over an image, and so is their rounding error, which
# makes the sums over the pixels of few images a matter of luck.
SHAPES = {
    "VAR": (2, 32, 120, 4, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "narrow": (3, 3, 17, 1, (1, 2, 4)),
    "one vector": (4, 8, 65, 4, (1, 3, 5)),
    "just over a vector": (3, 17, 33, 2, (2, 5, 7)),
    "just under": (5, 15, 60, 3, (1, 5, 11)),
    "two strips": (1, 65, 40, 4, (1, 2, 3, 7)),
    "one code": (2, 5, 1, 4, (1, 3)),
    "one channel": (2, 1, 9, 4, (1, 2, 3)),
    "one scale": (3, 9, 30, 4, (6,)),
    "one pixel": (3, 6, 30, 1, (1,)),
    "wide": (4, 12, 50, 6, ((1, 1), (1, 3), (2, 5), (3, 4), (4, 11), (4, 13))),
    "tall": (3, 12, 50, 5, ((1, 1), (3, 1), (8, 2), (13, 3))),
    "full size twice": (4, 7, 50, 3, ((5, 6), (2, 2), (5, 6))),
    "larger on the way": (1, 7, 50, 3, ((2, 2), (9, 4), (3, 11), (5, 6))),
    "nine images": (9, 8, 40, 4, (1, 2, 3, 5)),
    "seventeen images": (17, 4, 20, 2, (1, 2, 3)),
}
SMALL = SHAPES["just over a vector"]


def pairs(patch_nums) -> list[tuple[int, int]]:
    return [(size, size) if isinstance(size, int) else size for size in patch_nums]


def inputs(shape, *, seed: int = 1, dtype=torch.float32) -> list[torch.Tensor]:
    """f, codebook, phi_weight, phi_bias; a weak mean in each, so that no part can be ignored."""
    batch, channels, codes, convolutions, patch_nums = shape
    height, width = pairs(patch_nums)[-1]
    return [
        randn(batch, channels, height, width, seed=seed, dtype=dtype),
        (randn(codes, channels, seed=seed + 1, dtype=torch.float64, std=0.6) + 0.05).to(dtype),
        randn(convolutions, channels, channels, 3, 3, seed=seed + 2, dtype=dtype, std=(9 * channels) ** -0.5),
        (randn(convolutions, channels, seed=seed + 3, dtype=torch.float64, std=0.1) + 0.05).to(dtype),
    ]


def gradients(result, tensors, seed=9) -> list[torch.Tensor]:
    """Of a weighted sum of f_hat and the loss: both parts matter in the gradient of f."""
    weights = randn(*result.f_hat.shape, seed=seed, dtype=torch.float64, std=1e-3).to(result.f_hat.dtype)
    return torch.autograd.grad((result.f_hat * weights).sum().to(result.vq_loss.dtype) + 3 * result.vq_loss, tensors)


def leaves(tensors, dtype=None) -> list[torch.Tensor]:
    return [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
