"""3×3 convolutions of the decoder of VAR at 256 px, beside those of oneDNN."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from var_kernels import PackedConv3x3, backends
from var_kernels.testing import randn, stated_order

from .harness import OURS, Call, Case, Judge, Unavailable, judge_floats, plain_part
from .table import Work


class Inputs(NamedTuple):
    """x (B, C, H, W), channels last; weight (O, C, 3, 3), bias (O,); whether x is doubled first."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    doubling: bool


def make_inputs(batch, channels, out_channels, side, doubling, dtype) -> Inputs:
    x = randn(batch, channels, side, side, seed=0, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = randn(out_channels, channels, 3, 3, seed=1) / (9 * channels) ** 0.5
    return Inputs(x, weight.contiguous(memory_format=torch.channels_last), randn(out_channels, seed=2), doubling)


def _ours(inputs: Inputs) -> Call:
    x, weight, bias, doubling = inputs
    if (reason := backends.unavailable_reason("cpu", x.device.type, "winograd_conv", x.dtype)) is not None:
        raise Unavailable(reason)
    conv = PackedConv3x3(weight, bias, dtype=x.dtype, doubling=doubling)
    return lambda: conv(x)


def _direct(inputs: Inputs, dtype: torch.dtype | None = None) -> Call:
    dtype = dtype or inputs.x.dtype
    x, weight, bias = (tensor.to(dtype) for tensor in inputs[:3])

    def call():
        wide = F.interpolate(x, scale_factor=2, mode="nearest") if inputs.doubling else x
        return F.conv2d(wide, weight, bias, padding=1)

    return call


def _summed_taps(inputs: Inputs) -> Call:
    """Doubling and a 3×3 convolution as one transposed 4×4 convolution of stride 2, with 4 products instead of 9.

    Output pixel 2i + a sees only the input rows i − 1 and i (a = 0) or i and i + 1 (a = 1). Taps that fall on the same
    row are added up beforehand, in each direction: (w2, w1 + w2, w0 + w1, w0).
    """
    x, weight, bias, _ = inputs
    taps = weight.double()
    for dim in (2, 3):
        w0, w1, w2 = taps.unbind(dim)
        taps = torch.stack((w2, w1 + w2, w0 + w1, w0), dim)
    taps = taps.transpose(0, 1).to(x.dtype, memory_format=torch.channels_last)
    return lambda: F.conv_transpose2d(x, taps, bias.to(x.dtype), stride=2, padding=1)


def _judge(inputs: Inputs) -> Judge:
    exact = _direct(inputs, torch.float64)()
    rows = min(8, inputs.x.shape[2])  # rows of each image; the window of the last one also needs the row below
    some = slice(rows * exact.shape[2] // inputs.x.shape[2])
    with stated_order():
        part = _direct(inputs._replace(x=inputs.x[:, :, : rows + 1]))()[:, :, some]
    judge = judge_floats({"y": exact}, {"y": plain_part(exact, part, slice(None), slice(None), some)})
    return lambda results, peer=False: judge(results, peer=True)  # F(4×4) has up to five times the error


def case(tier, channels, out_channels, side, dtype, doubling=False, batch=1) -> Case:
    name = f"B{batch} {channels} to {out_channels}, {side}×{side}{' doubled' if doubling else ''}"
    pixels = batch * (side * (2 if doubling else 1)) ** 2
    return Case(
        group="conv 3×3",
        name=f"{name} {str(dtype).removeprefix('torch.')}",
        tier=tier,
        inputs=functools.partial(make_inputs, batch, channels, out_channels, side, doubling, dtype),
        providers={
            OURS: _ours, "F.conv2d": _direct,
            **({"transposed, summed taps": _summed_taps} if doubling else {}),
        },
        baseline="F.conv2d",
        judge=_judge,
        devices=("cpu", "cuda"),
        work=Work(18.0 * channels * out_channels * pixels, "FLOP", "fp32" if dtype == torch.float32 else "bf16"),
    )  # fmt: skip


_FP32, _BF16 = torch.float32, torch.bfloat16
CASES = (
    case("smoke", 32, 32, 16, _FP32, batch=2),
    case("smoke", 32, 48, 8, _BF16, doubling=True, batch=2),
    case("quick", 160, 160, 256, _FP32),
    case("quick", 160, 160, 256, _BF16),
    *(
        case("full", *shape, dtype, doubling)
        for *shape, doubling in (
            (640, 640, 16, False), (320, 320, 64, False), (160, 160, 128, False), (320, 320, 64, True),
            (160, 160, 128, True),
        )
        for dtype in (_FP32, _BF16)
    ),
)  # fmt: skip


def test_winograd_conv(duel):
    duel()
