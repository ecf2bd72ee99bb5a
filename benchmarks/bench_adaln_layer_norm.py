"""AdaLN-modulated LayerNorm, alone and fused with the gated residual sum, at the widths of the released models."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from var_kernels import adaln_layer_norm, gated_residual_adaln
from var_kernels.testing import modulation, randn, stated_order

from .harness import Call, Case, Judge, compiled, judge_floats, only_on, our_providers
from .table import Work


class Inputs(NamedTuple):
    """The arguments of the op, and the gradients of its outputs, which are empty in forward cases."""

    tensors: tuple[torch.Tensor, ...]
    douts: tuple[torch.Tensor, ...]


def make_inputs(batch, length, channels, dtype, gated, backward) -> Inputs:
    streams = [randn(batch, length, channels, seed=seed, dtype=dtype) for seed in range(2 if gated else 1)]
    parts = modulation(batch, channels, seed=7, dtype=dtype, parts=3 if gated else 2)
    tensors = tuple(tensor.detach().requires_grad_(backward) for tensor in (*streams, *parts))
    douts = [randn(batch, length, channels, seed=20 + i, dtype=dtype) for i in range(2 if gated else 1)]
    return Inputs(tensors, tuple(douts) if backward else ())


def timed(function, inputs: Inputs) -> Call:
    """One call of `function(*tensors)`: its outputs, and its gradients if the case has a backward."""
    if not inputs.douts:
        return torch.no_grad()(lambda: function(*inputs.tensors))

    def step():
        outs = function(*inputs.tensors)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return *outs, *torch.autograd.grad(outs, inputs.tensors, inputs.douts)

    return step


def composition(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gated_composition(x, branch, gate, scale, shift):
    residual = x + gate * branch
    return residual, composition(residual, scale, shift)


def _function(inputs: Inputs):
    return composition if len(inputs.tensors) == 3 else gated_composition


def ours(inputs: Inputs, backend: str) -> Call:
    op = gated_residual_adaln if _function(inputs) is gated_composition else adaln_layer_norm
    return timed(functools.partial(op, backend=backend), inputs)


def eager(inputs: Inputs) -> Call:
    return timed(_function(inputs), inputs)


@compiled
def torch_compile(inputs: Inputs) -> Call:
    return timed(torch.compile(_function(inputs), dynamic=False), inputs)


@only_on("cuda")
def liger(inputs: Inputs) -> Call:
    """Liger's LayerNorm with unit weight and zero bias, modulated by PyTorch, because Liger has no modulated one."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x = inputs.tensors[0]
    ones, zeros = torch.ones(x.shape[-1], device=x.device, dtype=x.dtype), torch.zeros_like(x[0, 0])

    def modulated(x, scale, shift):
        return LigerLayerNormFunction.apply(x, ones, zeros, 1e-6) * (1 + scale) + shift

    def gated(x, branch, gate, scale, shift):
        residual = x + gate * branch
        return residual, modulated(residual, scale, shift)

    return timed(gated if _function(inputs) is gated_composition else modulated, inputs)


PEERS = {"eager": eager, "torch.compile": torch_compile, "Liger LayerNorm": liger}


def judge(inputs: Inputs) -> Judge:
    gated = _function(inputs) is gated_composition
    names = ("residual", "y") if gated else ("y",)
    if inputs.douts:
        names += ("dx", "dbranch", "dgate", "dscale", "dshift") if gated else ("dx", "dscale", "dshift")

    def results(dtype) -> dict[str, torch.Tensor]:
        tensors = tuple(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs.tensors)
        found = eager(Inputs(tensors, tuple(dout.to(dtype) for dout in inputs.douts)))()
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))

    with stated_order():
        plain = results(inputs.tensors[0].dtype)
    return judge_floats(results(torch.float64), plain)


def case(tier, shape, dtype, *, gated=False, backward=False, **options) -> Case:
    batch, length, channels = shape
    # The number of tensors of x's size that are read or written once. In the forward they are x and y, or x, branch,
    # residual and y; in the backward dy, x and dx, or dresidual, dy, residual, branch, dx and dbranch.
    streams = (4 if gated else 2) + ((6 if gated else 3) if backward else 0)
    op = "gated_residual_adaln" if gated else "adaln_layer_norm"
    return Case(
        group=f"{op} " + ("forward+backward" if backward else "forward"),
        name=f"({batch}, {length}, {channels}) {str(dtype).removeprefix('torch.')}",
        tier=tier,
        inputs=functools.partial(make_inputs, batch, length, channels, dtype, gated, backward),
        providers={**our_providers(ours, op), **PEERS},
        baseline="eager",
        judge=judge,
        work=Work(streams * batch * length * channels * dtype.itemsize, "B", "copy"),
        op=op,
        **options,
    )


_SHAPES = {
    ("smoke", (2, 130, 256)): ("cpu", "cuda"),
    ("quick", (4, 680, 1024)): ("cpu",),
    ("full", (2, 2240, 2304)): ("cpu",),
    ("quick", (32, 680, 1024)): ("cuda",),
    ("quick", (8, 2240, 2304)): ("cuda",),
    ("full", (32, 680, 1920)): ("cuda",),
}
CASES = tuple(
    case(
        tier,
        shape,
        dtype,
        gated=gated,
        backward=backward,
        headline=tier != "full" and dtype == torch.float32,
        devices=devices,
    )
    for (tier, shape), devices in _SHAPES.items()
    for gated in (False, True)
    for backward in (False, True)
    for dtype in (torch.float32, torch.bfloat16)
)


def test_adaln_layer_norm(duel):
    duel()
