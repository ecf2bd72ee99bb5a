"""A linear layer for inference: weights packed once, bias and GELU in the epilogue.

`F.linear` hands fp32 weights as they are to BLAS in every call, which reaches 40 % of the multiply-add peak of an AMD
server. With weights in the order in which they are read that is 85 to 92 %, and at two rows four times as fast.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from .._checks import refuse_gradients
from ..native import load
from ..native.library import define, register_fake
from . import huge_pages

# x is (M, K), dense; the packed weights and the bias are those of `_pack`.
define("_packed_linear(Tensor x, Tensor packed, Tensor bias, int out_features, bool gelu) -> Tensor", __name__)
_STRIP, _GROUP, _COLUMNS = 48, 512, 16  # of packed_linear.h, compared by a test
# Where our kernel is the fastest.
_LEVELS = {torch.float32: ("avx2", "avx512", "avx512_bf16", "amx"), torch.bfloat16: ("avx512_bf16",)}

_OPS = ("_reorder_linear_weight", "_linear_pointwise")


@register_fake("_packed_linear")
def _(x, packed, bias, out_features, gelu):
    return x.new_empty(x.shape[0], out_features)


def packing_unavailable_reason(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> str | None:
    """Why weights of this dtype on this device are not packed and `F.linear` serves; None if they are."""
    if torch.device(device).type != "cpu":
        return "packing is for the CPU"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"float32 and bfloat16 are packed, not {dtype}"
    if kernel_unavailable_reason(dtype) is None:
        return None
    return _no_onednn() or (_no_bf16() if dtype == torch.bfloat16 else None)


def kernel_unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of this dtype, float32 or bfloat16, are not packed for our own kernel but for oneDNN; or None."""
    status = load.native_library()
    if not status.available:
        return f"the native library is not available: {status.reason}"
    if status.isa in _LEVELS[dtype]:
        return None
    return "oneDNN multiplies on the tile registers" if status.isa == "amx" else f"ISA level {status.isa} has none"


def packer(dtype: torch.dtype) -> str:
    """What serves weights of this dtype on a CPU, and why nothing faster does, in words."""
    ours = kernel_unavailable_reason(dtype)
    reason = packing_unavailable_reason(dtype)
    served = "our kernel" if ours is None else "oneDNN" if reason is None else f"F.linear ({reason})"
    return served if ours is None else f"{served} (our kernel: {ours})"


@functools.cache
def _no_onednn() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    missing = [name for name in _OPS if not hasattr(torch.ops.mkldnn, name)]
    return f"this torch has no operator mkldnn::{missing[0]}" if missing else None


@functools.cache
def _no_bf16() -> str | None:
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return None if supported else "oneDNN has no bf16 on this processor"


def _strips(columns: int) -> list[int]:
    """The widths of the strips of columns that lie together, as in packed_linear.h."""
    groups = [min(_GROUP, columns - begin) for begin in range(0, columns, _GROUP)]
    widths = []
    for left in groups:
        while left:
            widths.append(32 if left == 64 else min(_STRIP, left))
            left -= widths[-1]
    return widths


def _pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Strips of outputs, padded with zeros to a multiple of 16; in each the inputs (bf16: pairs), in each the strip."""
    if lacking := -len(weight) % _COLUMNS:
        weight = F.pad(weight, (0, 0, 0, lacking))
    scalar = torch.int32  # a float, or a pair
    # Each strip is converted and transposed where it goes: a temporary as large as the weight would stay with malloc.
    strips = (strip.to(dtype).contiguous().view(scalar).t() for strip in weight.split(_strips(len(weight))))
    return huge_pages.filled(weight.numel() * dtype.itemsize // scalar.itemsize, strips, scalar).view(dtype)


class PackedLinear:
    """y = x·Wᵀ + b, or tanh-GELU of that, with W in the order in which the kernel reads it.

    The kernel is our own on x86-64 processors with AVX2 (fp32) and with the bf16 products of AVX-512 (bf16), but for an
    odd number of bf16 inputs; oneDNN's elsewhere, and of bf16 on the tile registers of AMX.

    Args:
        weight: (N, K). Packed, it is read now and not kept: later changes of it do not show.
        bias: (N,) or None.
        dtype: of x and of the result, to which weight and bias are converted; None: that of the weight. float32 and
            bfloat16 are packed.
        gelu: whether y = GELU(x·Wᵀ + b), in its tanh form.
        pack: False keeps `weight` itself and calls `F.linear`, as happens anyway where packing is not available
            (:func:`packing_unavailable_reason`).

    Called with x (…, K) in that dtype it returns (…, N). `nbytes` says what this object holds beside the weight that it
    was given: the packed or converted copy. `packed_by_us` says whether our kernel serves. There is no gradient.

    Raises TypeError and ValueError for a weight, bias or x of another dtype, shape or device; RuntimeError where a
    gradient would be needed.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None,
        gelu: bool = False, pack: bool = True,
    ) -> None:  # fmt: skip
        if weight.dim() != 2:
            raise ValueError(f"weight: expected 2 dimensions, got shape {tuple(weight.shape)}")
        if not weight.is_floating_point():
            raise TypeError(f"weight: expected a floating-point dtype, got {weight.dtype}")
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"bias: expected shape {(weight.shape[0],)}, got {tuple(bias.shape)}")
        if bias is not None and bias.device != weight.device:
            raise ValueError(f"bias: expected device {weight.device} like weight, got {bias.device}")
        self.out_features, self.in_features = weight.shape
        self.dtype, self.device, self.gelu = dtype or weight.dtype, weight.device, gelu
        weight = weight.detach()
        self._bias = None if bias is None else bias.detach().to(self.dtype)
        self.packed = pack and weight.numel() > 0 and packing_unavailable_reason(self.dtype, self.device) is None
        even = self.dtype != torch.bfloat16 or self.in_features % 2 == 0
        self.packed_by_us = self.packed and even and kernel_unavailable_reason(self.dtype) is None
        if self.packed_by_us:
            self._weight = _pack(weight, self.dtype)
            addend = torch.zeros(self.out_features) if bias is None else self._bias.float()
            self._bias = F.pad(addend, (0, -self.out_features % _COLUMNS))
        elif self.packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous())
        else:
            self._weight = weight.to(self.dtype)
        self._copied = self.packed or self.dtype != weight.dtype
        self._epilogue = ("gelu", [], "tanh") if gelu else ("none", [], "")

    @property
    def nbytes(self) -> int:
        """Bytes of the packed or converted copy, 0 where the weight itself is used."""
        return self._weight.nbytes if self._copied else 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: expected (…, {self.in_features}) {self.dtype}, got {tuple(x.shape)} {x.dtype}"
            )
        if x.device != self.device:
            raise ValueError(f"x: expected device {self.device} like the weight, got {x.device}")
        refuse_gradients("PackedLinear", x)
        if self.packed_by_us:
            rows = x.reshape(-1, self.in_features).contiguous()
            y = torch.ops.var_kernels._packed_linear(rows, self._weight, self._bias, self.out_features, self.gelu)
            return y.view(*x.shape[:-1], self.out_features)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._epilogue)
        y = F.linear(x, self._weight, self._bias)
        return F.gelu(y, approximate="tanh") if self.gelu else y
