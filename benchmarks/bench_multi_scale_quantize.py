"""Multi-scale residual quantization of a latent map, as in encoding an image."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from var_kernels import multi_scale_quantize
from var_kernels.multi_scale_quantize import phi_index
from var_kernels.testing import SCHEDULES, randn, stated_order

from .bench_nearest_code import by_addmm
from .harness import Call, Case, Judge, compiled, judge_floats, our_providers
from .table import Work


class Inputs(NamedTuple):
    """f (B, C, H, W), codebook (V, C), phi_weight (4, C, C, 3, 3), phi_bias (4, C)."""

    f: torch.Tensor
    codebook: torch.Tensor
    phi_weight: torch.Tensor
    phi_bias: torch.Tensor
    patch_nums: tuple[int, ...]


def make_inputs(batch, codes, channels, patch_nums) -> Inputs:
    side = patch_nums[-1]
    # Codes have different lengths, as in a trained tokenizer: its codebook serves every scale, and residuals shrink.
    spread = torch.linspace(0.1, 1, codes)[:, None]
    return Inputs(
        randn(batch, channels, side, side, seed=0),
        randn(codes, channels, seed=1) * spread,
        randn(4, channels, channels, 3, 3, seed=2, std=(9 * channels) ** -0.5),
        randn(4, channels, seed=3, std=0.01),
        patch_nums,
    )


def ours(inputs: Inputs, backend: str) -> Call:
    def quantize():
        found = multi_scale_quantize(*inputs, backend=backend)
        return found.tokens, found.f_hat

    return torch.no_grad()(quantize)


def composition(patch_nums):
    """The loop as models write it: pooling, search by addmm and argmax, gather, bicubic, convolution, accumulation."""
    indices = [phi_index(k, len(patch_nums), 4) for k in range(len(patch_nums))]

    def quantize(f, codebook, half_norms, phi_weight, phi_bias):
        batch, channels, height, width = f.shape
        rest, f_hat, tokens = f, torch.zeros_like(f), []
        for i, side in zip(indices, patch_nums, strict=True):
            pooled = rest if side == height else F.interpolate(rest, size=(side, side), mode="area")
            z = pooled.permute(0, 2, 3, 1).reshape(-1, channels)
            codes = by_addmm(z, codebook, half_norms)
            h = F.embedding(codes, codebook).view(batch, side, side, channels).permute(0, 3, 1, 2)
            if side != height:
                h = F.interpolate(h, size=(height, width), mode="bicubic")
            h = 0.5 * h + 0.5 * F.conv2d(h, phi_weight[i], phi_bias[i], padding=1)
            f_hat, rest = f_hat + h, rest - h
            tokens.append(codes.view(batch, -1))
        return torch.cat(tokens, dim=1), f_hat

    return quantize


def _with(function, inputs: Inputs) -> Call:
    half_norms = inputs.codebook.square().sum(dim=-1) / 2
    arguments = (inputs.f, inputs.codebook, half_norms, inputs.phi_weight, inputs.phi_bias)
    return torch.no_grad()(lambda: function(*arguments))


def eager(inputs: Inputs) -> Call:
    return _with(composition(inputs.patch_nums), inputs)


@compiled
def torch_compile(inputs: Inputs) -> Call:
    return _with(torch.compile(composition(inputs.patch_nums), dynamic=False), inputs)


PROVIDERS = {
    **our_providers(ours, "multi_scale_quantize"),
    "eager loop": eager,
    "torch.compile of it": torch_compile,
}
MISSING = {
    "faiss-cpu": "searches one codebook only, see nearest_code",
    "vector-quantize-pytorch": "has no residual quantizer over token maps of growing size, see nearest_code",
}


def judge(inputs: Inputs) -> Judge:
    """Requires all tokens of float64, because a different token changes every later scale."""
    wide = Inputs(*(tensor.double() for tensor in inputs[:4]), inputs.patch_nums)
    tokens, exact = eager(wide)()
    with stated_order():
        plain_tokens, plain = eager(inputs)()
    if not torch.equal(plain_tokens, tokens):
        raise AssertionError("these inputs have a near-tie that float32 does not resolve: choose another seed")
    judge_map = judge_floats({"f_hat": exact}, {"f_hat": plain})

    def judge_both(results, peer: bool = False) -> float:
        found, f_hat = results
        if found.shape != tokens.shape or not torch.equal(found, tokens):
            wrong = "all" if found.shape != tokens.shape else int((found != tokens).sum())
            raise AssertionError(f"tokens: {wrong} of {tokens.numel()} differ from those of float64")
        return judge_map(f_hat, peer)

    return judge_both


def case(tier, batch, codes, schedule, channels=32, **options) -> Case:
    patch_nums = SCHEDULES[schedule]
    length, area, scales = sum(side**2 for side in patch_nums), patch_nums[-1] ** 2, len(patch_nums)
    # The terms are the search, the 3×3 convolution of every scale, and bicubic (16 taps) of all scales but the last.
    per_image = 2 * channels * (length * codes + scales * area * 9 * channels + (scales - 1) * area * 16)
    return Case(
        group="multi_scale_quantize encode",
        name=f"B{batch} {schedule} V{codes} C{channels} float32",
        tier=tier,
        inputs=functools.partial(make_inputs, batch, codes, channels, patch_nums),
        providers=PROVIDERS,
        baseline="eager loop",
        judge=judge,
        work=Work(batch * per_image, "FLOP", "fp32"),
        missing=MISSING,
        op="multi_scale_quantize",
        **options,
    )


CASES = (
    case("smoke", 2, 512, "embedded", headline=True, devices=("cpu", "cuda")),
    case("quick", 1, 4096, "256px", headline=True, devices=("cpu", "cuda")),
    case("quick", 8, 4096, "256px", headline=True),
    case("full", 1, 4096, "512px"),
    case("quick", 32, 4096, "256px", devices=("cuda",)),
)


def test_multi_scale_quantize(duel):
    duel()
