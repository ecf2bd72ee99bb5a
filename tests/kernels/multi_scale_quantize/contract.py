"""What the tests of every backend of the quantizer share: shapes, inputs, comparisons, a second Algorithm 1."""

import numpy
import torch
import torch.nn.functional as F

from var_kernels import multi_scale_quantize, next_scale_input
from var_kernels.testing import assert_accurate, randn, stated_order

NAMES = ("f", "codebook", "phi_weight", "phi_bias")

# (batch, channels, codes, convolutions, maps). Channels straddle the vectors of every ISA level (4, 8, 16) and the
# column strips of the matrix product (16, 32, 64). Heights straddle the bands of four rows, widths the register tile of
# six pixels, and batches the slots of eight images of the backward. Maps are square or not, some taller than wide, some
# as large as the full map in the middle of the schedule, some larger than it along one axis; one schedule has a single
# map. Where maps are small, there are several images: the codes of scale 0 are constant over an image, and so is their
# rounding error, so that with few images the error of a sum over pixels would depend on chance.
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
    """f, codebook, phi_weight and phi_bias. Codes and biases have a small mean, so that no part can be ignored."""
    batch, channels, codes, convolutions, patch_nums = shape
    height, width = pairs(patch_nums)[-1]
    return [
        randn(batch, channels, height, width, seed=seed, dtype=dtype),
        (randn(codes, channels, seed=seed + 1, dtype=torch.float64, std=0.6) + 0.05).to(dtype),
        randn(convolutions, channels, channels, 3, 3, seed=seed + 2, dtype=dtype, std=(9 * channels) ** -0.5),
        (randn(convolutions, channels, seed=seed + 3, dtype=torch.float64, std=0.1) + 0.05).to(dtype),
    ]


def gradients(result, tensors, seed=9) -> list[torch.Tensor]:
    """Gradients of a weighted sum of f_hat and the loss, in which both parts contribute to the gradient of f."""
    weights = randn(*result.f_hat.shape, seed=seed, dtype=torch.float64, std=1e-3).to(result.f_hat.dtype)
    return torch.autograd.grad((result.f_hat * weights).sum().to(result.vq_loss.dtype) + 3 * result.vq_loss, tensors)


def leaves(tensors, dtype=None) -> list[torch.Tensor]:
    return [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]


def assert_right(result, derivatives, tensors, maps, **options):
    """Tokens are those of float64, the rest is as accurate as plain PyTorch. Returns the tokens of plain PyTorch."""

    def reference(dtype=None):
        arguments = leaves(tensors, dtype)
        outcome = multi_scale_quantize(*arguments, maps, **options, backend="reference")
        return outcome, gradients(outcome, arguments)

    with stated_order():
        plain, plain_gradients = reference()
    exact, exact_gradients = reference(torch.float64)
    assert torch.equal(result.tokens, exact.tokens)
    assert_accurate(result.f_hat, plain.f_hat, exact.f_hat, name="f_hat")
    assert_accurate(result.vq_loss, plain.vq_loss, exact.vq_loss, name="vq_loss")
    for name, *parts in zip(NAMES, derivatives, plain_gradients, exact_gradients, strict=True):
        assert_accurate(*parts, name=f"gradient of {name}")
    return plain.tokens


def assert_exact_far_from_the_origin(quantize, images: int = 2) -> None:
    """`quantize(f, codebook, weight, bias, maps)` finds the tokens that float64 finds for codes far from the origin."""
    f, codebook, weight, bias = inputs((images, 32, 300, 1, (7,)))
    f, codebook = f + 1000, codebook + 1000
    tokens = quantize(f, codebook, weight, bias, (7,)).tokens
    rows = f.double().flatten(2).mT
    exact = (rows.unsqueeze(2) - codebook.double()).square().sum(-1).argmin(-1)
    assert torch.equal(tokens, exact)


def assert_right_step(found, tensors, maps, k, **options):
    """`found`, the next_scale_input of `tensors` after scale k, is as accurate as plain PyTorch."""
    with stated_order():
        plain = next_scale_input(*tensors, maps, k, **options, backend="reference")
    exact = next_scale_input(*(tensor.double() for tensor in tensors), maps, k, **options, backend="reference")
    for part, *values in zip(("f_hat", "next map"), found, plain, exact, strict=True):
        if values[1] is None:
            assert values[0] is None and values[2] is None
        else:
            assert_accurate(*values, name=f"{part} after scale {k}")


def composition(f, codebook, weight, bias, patch_nums, *, ratio=0.5, metric="l2", beta=0.25):
    """Algorithm 1, written a second time: tokens, f_hat, loss, and the smallest relative gap of the best two codes."""
    sizes = pairs(patch_nums)
    full, n = sizes[-1], weight.shape[0]
    ticks = numpy.linspace(1 / 3 / n, 1 - 1 / 3 / n, n) if n == 4 else numpy.linspace(1 / 2 / n, 1 - 1 / 2 / n, n)
    f_hat, loss, tokens, gap = torch.zeros_like(f), 0, [], numpy.inf
    for k, size in enumerate(sizes):
        z = F.adaptive_avg_pool2d((f - f_hat).detach(), size).movedim(1, -1)
        if metric == "l2":
            distance = (z.unsqueeze(-2) - codebook.detach()).square().sum(-1)
        else:
            distance = 1 - F.cosine_similarity(z.unsqueeze(-2), codebook.detach(), dim=-1, eps=1e-300)
        if codebook.shape[0] > 1:
            best, second = distance.topk(2, largest=False).values.unbind(-1)
            gap = min(gap, ((second - best) / second).min().item())
        ids = distance.argmin(-1)
        u = F.embedding(ids, codebook).movedim(-1, 1)
        if size != full:
            u = F.interpolate(u, size=full, mode="bicubic")
        i = int(numpy.argmin(numpy.abs(ticks - (k / (len(sizes) - 1) if len(sizes) > 1 else 0))))
        f_hat = f_hat + (1 - ratio) * u + ratio * F.conv2d(u, weight[i], bias[i], padding=1)
        loss = loss + beta * (f_hat.detach() - f).square().mean() + (f_hat - f.detach()).square().mean()
        tokens.append(ids.flatten(1))
    return torch.cat(tokens, dim=1), f_hat, loss / len(sizes), gap
