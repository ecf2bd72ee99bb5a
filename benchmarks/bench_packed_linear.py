"""The projections of one VAR block, for the rows of one scale, beside oneDNN's packed weights and F.linear."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from var_kernels import PackedLinear, backends
from var_kernels.inference import packing
from var_kernels.testing import randn, stated_order

from .harness import OURS, Call, Case, Judge, Unavailable, judge_floats, plain_part
from .table import Work

# One block of VAR d16 has 24 MiB of weights in bf16. Several blocks, more than fit a common last-level cache (32 MiB),
# are called in turn, so that weights come from memory, as in generation.
_CYCLED_BYTES = 96 << 20


class Inputs(NamedTuple):
    """x (M, C) and the weights of several blocks: qkv (3C, C), proj (C, C), fc1 (4C, C) with GELU, fc2 (C, 4C)."""

    x: torch.Tensor
    blocks: list[list[torch.Tensor]]


def make_inputs(rows, width, dtype) -> Inputs:
    shapes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    one = [randn(*shape, seed=i).div(shape[1] ** 0.5).to(dtype) for i, shape in enumerate(shapes)]
    count = max(1, _CYCLED_BYTES // sum(weight.nbytes for weight in one))
    return Inputs(randn(rows, width, seed=9, dtype=dtype), [[weight.clone() for weight in one] for _ in range(count)])


def _calls(inputs: Inputs, layer) -> Call:
    """A function that computes one block in each call, and the next block in the next call."""
    turn = itertools.cycle([[layer(weight, gelu=i == 2) for i, weight in enumerate(block)] for block in inputs.blocks])

    def call():
        qkv, proj, fc1, fc2 = next(turn)
        y = proj(inputs.x)
        return qkv(inputs.x), y, fc2(fc1(y))

    return call


def _ours(inputs: Inputs) -> Call:
    dtype, device = inputs.x.dtype, inputs.x.device
    reason = backends.unavailable_reason("cpu", device.type, "packed_linear", dtype)
    if (reason := reason or packing.kernel_unavailable_reason(dtype)) is not None:
        raise Unavailable(reason)
    return _calls(inputs, PackedLinear)


def _onednn(inputs: Inputs) -> Call:
    dtype, device = inputs.x.dtype, inputs.x.device
    with mock.patch.object(packing, "kernel_unavailable_reason", lambda dtype: "oneDNN is asked for"):
        if (reason := backends.unavailable_reason("cpu", device.type, "packed_linear", dtype)) is not None:
            raise Unavailable(reason)
        return _calls(inputs, PackedLinear)


def _plain(inputs: Inputs, dtype: torch.dtype | None = None) -> Call:
    converted = inputs if dtype is None else Inputs(
        inputs.x.to(dtype), [[weight.to(dtype) for weight in inputs.blocks[0]]]
    )  # fmt: skip

    def layer(weight, gelu):
        if gelu:
            return lambda x: F.gelu(F.linear(x, weight), approximate="tanh")
        return lambda x: F.linear(x, weight)

    return _calls(converted, layer)


def _judge(inputs: Inputs) -> Judge:
    names = ("qkv", "proj", "fc2 of fc1")
    exact = _plain(inputs, torch.float64)()
    some = slice(None, None, -(-len(inputs.x) // 64))  # some rows are enough: they do not depend on one another
    with stated_order():
        parts = _plain(Inputs(inputs.x[some], inputs.blocks[:1]))()
    plain = [plain_part(*tensors, some) for tensors in zip(exact, parts, strict=True)]
    return judge_floats(dict(zip(names, exact, strict=True)), dict(zip(names, plain, strict=True)))


def case(tier, rows, width, dtype) -> Case:
    return Case(
        group="linear",
        name=f"block of width {width}, {rows} rows {str(dtype).removeprefix('torch.')}",
        tier=tier,
        inputs=functools.partial(make_inputs, rows, width, dtype),
        providers={OURS: _ours, "F.linear": _plain, "oneDNN, packed": _onednn},
        baseline="F.linear",
        judge=_judge,
        devices=("cpu", "cuda"),
        work=Work(24.0 * rows * width**2, "FLOP", "fp32" if dtype == torch.float32 else "bf16"),
    )


_FP32, _BF16 = torch.float32, torch.bfloat16
CASES = (
    case("smoke", 2, 64, _FP32),
    case("smoke", 18, 64, _BF16),
    case("quick", 512, 1024, _FP32),
    case("quick", 512, 1024, _BF16),
    *(case("full", rows, 1024, dtype) for rows in (2, 8, 32, 128, 2048) for dtype in (_FP32, _BF16)),
)


def test_packed_linear(duel):
    duel()
