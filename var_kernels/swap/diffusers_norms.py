"""diffusers: its adaptive norms, and the two formulas of its blocks.

Facts about the foreign classes (attributes, signatures, the order of chunks) are read from `models/normalization.py` of
https://github.com/huggingface/diffusers.
"""

from __future__ import annotations

import contextlib
from functools import reduce

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from ..adaln_layer_norm import adaln_layer_norm, gated_residual_adaln
from ..native.library import autocast_dtype
from .gated_sum import are_ordinary, gated_sum
from .structure import Target, exactly, layer_norm_difference

# ---- the formulas ------------------------------------------------------------------------------------------------

# `FP32LayerNorm`, which is a LayerNorm that computes in fp32, as our ops do.
_FP32_FORWARD = exactly("inputs", "F bias dtype eps float layer_norm normalized_shape to weight", "origin_dtype")


def _is_fp32_norm(cls: type) -> bool:
    return issubclass(cls, nn.LayerNorm) and _FP32_FORWARD.difference("forward", cls.forward) is None


def _is_layer_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm or _is_fp32_norm(type(norm))


def norm_difference(module: nn.Module, *names: str) -> str | None:
    """Why our ops can't stand for one of these LayerNorms of a module, None if they can."""
    return next(filter(None, (layer_norm_difference(module, name, _is_layer_norm) for name in names)), None)


def _fits(self: nn.Module, name: str, x: torch.Tensor, *modulations: torch.Tensor) -> bool:
    """Whether our ops take x with these modulations. The formula in PyTorch takes more.

    It broadcasts x to the batch of the modulations, differentiates in forward mode, and knows subclasses of tensors
    such as DTensor. It also calls the LayerNorm, which may have been replaced or got a hook since the swap.
    """
    return (
        x.dim() == 3
        and are_ordinary(x, *modulations)
        and forward_ad._current_level < 0
        and layer_norm_difference(self, name, _is_layer_norm) is None
        and x.shape[2:] == getattr(self, name).normalized_shape
        and all(part.shape == (x.shape[0], 1, x.shape[2]) or part.shape == (1, 1, x.shape[2]) for part in modulations)
    )


def _promoted(*tensors: torch.Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _normalised_dtype(norm: nn.Module, x: torch.Tensor) -> torch.dtype:
    """The dtype in which a LayerNorm without weights returns x. Autocast changes it on GPUs, but not on CPUs."""
    if autocast_dtype(x.device.type) is None or type(norm) is not nn.LayerNorm:
        return x.dtype
    return F.layer_norm(x.new_empty(0, 1), (1,)).dtype


def modulated(self: nn.Module, name: str, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x (B, L, C), normalised by the LayerNorm `name` and modulated by scale and shift (B or 1, 1, C).

    Its dtype is that of the formula in PyTorch, which the first line shows.
    """
    norm = getattr(self, name)
    if not _fits(self, name, x, scale, shift):
        return norm(x) * (1 + scale) + shift
    dtype = torch.promote_types(_normalised_dtype(norm, x), _promoted(scale, shift))
    return adaln_layer_norm(x.to(dtype), scale.to(dtype), shift.to(dtype), eps=norm.eps)


def gated_sum_and_norm(
    self: nn.Module, name: str, x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor,
    shift: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The residual x + gate * branch, and the input of the next branch, which is `modulated` of the residual.

    Under autocast the latter has the dtype of the branch, because the next branch begins with a projection, which
    would round it to that dtype.
    """
    norm = getattr(self, name)
    dtype = _promoted(x, branch, gate)
    autocast = autocast_dtype(x.device.type) is not None
    if (
        branch.shape != x.shape
        or not are_ordinary(branch)
        or not (autocast or _promoted(scale, shift) == dtype)
        or not _fits(self, name, x, gate, scale, shift)
    ):
        residual = gated_sum(x, branch, gate)
        return residual, modulated(self, name, residual, scale, shift)
    if not autocast or dtype != torch.float32:
        branch = branch.to(dtype)
    x, gate, scale, shift = (tensor.to(dtype) for tensor in (x, gate, scale, shift))
    # Autocast would convert the branch to the dtype of x.
    without = torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext()
    with without:
        return gated_residual_adaln(x, branch, gate, scale, shift, eps=norm.eps)


# ---- norms -------------------------------------------------------------------------------------------------------


def _ada_zero(self: nn.Module, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
    """`AdaLayerNormZero.forward`."""
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    emb = self.linear(self.silu(emb))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)
    y = modulated(self, "norm", x, scale_msa[:, None], shift_msa[:, None])
    return y, gate_msa, shift_mlp, scale_mlp, gate_mlp


def _ada_zero_single(self: nn.Module, x, emb=None):
    """`AdaLayerNormZeroSingle.forward`."""
    shift_msa, scale_msa, gate_msa = self.linear(self.silu(emb)).chunk(3, dim=1)
    return modulated(self, "norm", x, scale_msa[:, None], shift_msa[:, None]), gate_msa


def _ada_zero_x(self: nn.Module, hidden_states, emb=None):
    """`SD35AdaLayerNormZeroX.forward`: two modulations of one norm."""
    emb = self.linear(self.silu(emb))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = emb.chunk(9, dim=1)
    y, y2 = (
        modulated(self, "norm", hidden_states, part[:, None], other[:, None])
        for part, other in ((scale, shift), (scale2, shift2))
    )
    return y, gate, shift_mlp, scale_mlp, gate_mlp, y2, gate2


def _ada_continuous(self: nn.Module, x, conditioning_embedding):
    """`AdaLayerNormContinuous.forward`."""
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return modulated(self, "norm", x, scale[:, None], shift[:, None])


def _makes(chunks: int):
    """Whether the linear layer of a norm makes this many modulations of its width."""

    def condition(module: nn.Module) -> bool:
        width = getattr(module.norm, "normalized_shape", getattr(module.norm, "dim", None))
        return isinstance(width, tuple) and getattr(module.linear, "out_features", None) == chunks * width[-1]

    return condition


_ADAPTIVE_NORM = ("silu", "linear", "norm")


def _norm_refusal(module: nn.Module) -> str | None:
    return norm_difference(module, "norm")


ZERO = Target(
    name="AdaLayerNormZero of diffusers",
    part="adaln",
    attributes=(*_ADAPTIVE_NORM, "emb"),
    condition=_makes(6),
    methods={
        "forward": exactly(
            "x timestep class_labels hidden_dtype emb", "chunk emb linear norm silu",
            "shift_msa scale_msa gate_msa shift_mlp scale_mlp gate_mlp",
        )
    },
    refusal=_norm_refusal,
    replacements={"forward": _ada_zero},
)  # fmt: skip
ZERO_SINGLE = Target(
    name="AdaLayerNormZeroSingle of diffusers",
    part="adaln",
    attributes=_ADAPTIVE_NORM,
    others=("emb",),
    condition=_makes(3),
    methods={"forward": exactly("x emb", "chunk linear norm silu", "shift_msa scale_msa gate_msa")},
    refusal=_norm_refusal,
    replacements={"forward": _ada_zero_single},
)
ZERO_X = Target(
    name="SD35AdaLayerNormZeroX of diffusers",
    part="adaln",
    attributes=_ADAPTIVE_NORM,
    others=("emb",),
    condition=_makes(9),
    methods={
        "forward": exactly(
            "hidden_states emb", "chunk linear norm silu",
            "shift_msa scale_msa gate_msa shift_mlp scale_mlp gate_mlp shift_msa2 scale_msa2 gate_msa2",
        )
    },
    refusal=_norm_refusal,
    replacements={"forward": _ada_zero_x},
)  # fmt: skip
CONTINUOUS = Target(
    name="AdaLayerNormContinuous of diffusers",
    part="adaln",
    attributes=_ADAPTIVE_NORM,
    others=("emb",),
    condition=_makes(2),
    methods={
        "forward": exactly("x conditioning_embedding", "chunk dtype linear norm silu to torch", "scale shift")
    },
    refusal=_norm_refusal,
    replacements={"forward": _ada_continuous},
)  # fmt: skip

TARGETS = (ZERO, ZERO_SINGLE, ZERO_X, CONTINUOUS)
