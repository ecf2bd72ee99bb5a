"""A linear layer for inference: weights packed once, bias and GELU in the epilogue.

`F.linear` hands fp32 weights as they are to BLAS in every call, which reaches 40 % of the multiply-add peak of an AMD
server. With weights in the order in which they are read that is 85 to 92 %, and at two rows four times as fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._checks import check, check_dtype, check_shape, check_tensor, refuse_gradients
from ..backends import resolve
from ..native.library import define, register_fake
from ..reference import packed_linear as _reference
from . import huge_pages, packing

# x is (M, K), dense; the packed weights and the bias are those of `_pack`.
define("_packed_linear(Tensor x, Tensor packed, Tensor bias, int out_features, bool gelu) -> Tensor", __name__)
_STRIP, _GROUP, _COLUMNS = 48, 512, 16  # of packed_linear.h, compared by a test


@register_fake("_packed_linear")
def _(x, packed, bias, out_features, gelu):
    return x.new_empty(x.shape[0], out_features)


def _strips(columns: int) -> list[int]:
    """The widths of the strips of columns that lie together, as in packed_linear.h."""
    groups = [min(_GROUP, columns - begin) for begin in range(0, columns, _GROUP)]
    widths = []
    for left in groups:
        while left:
            widths.append(32 if left == 64 else min(_STRIP, left))
            left -= widths[-1]
    return widths


def _inputs_together(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


def _pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Strips of outputs, padded with zeros to a multiple of 16; in each the inputs (bf16: pairs, of which the last may
    be padded with a zero), in each the strip."""
    lacking = -weight.shape[1] % _inputs_together(dtype), -len(weight) % _COLUMNS
    if any(lacking):
        weight = F.pad(weight, (0, lacking[0], 0, lacking[1]))
    scalar = torch.int32  # a float, or a pair
    # Each strip is converted and transposed where it goes: a temporary as large as the weight would stay with malloc.
    strips = (strip.to(dtype).contiguous().view(scalar).t() for strip in weight.split(_strips(len(weight))))
    return huge_pages.filled(weight.numel() * dtype.itemsize // scalar.itemsize, strips, scalar).view(dtype)


class PackedLinear:
    """y = x·Wᵀ + b, or tanh-GELU of that, with W in the order in which the kernel reads it.

    Backend `cpu` multiplies packed weights: with our own kernel on x86-64 processors with AVX2 (fp32) and with the bf16
    products of AVX-512 (bf16), with oneDNN's elsewhere, and in bf16 on the tile registers of AMX. Backend `reference`
    is `F.linear` with the weight itself. There is no kernel for GPUs.

    Args:
        weight: (N, K), any floating-point dtype. Packed, it is read now and not kept: later changes of it do not show.
        bias: (N,), any floating-point dtype, or None.
        dtype: of x and of the result, to which weight and bias are converted; None: that of the weight. `cpu` serves
            float32 and bfloat16.
        gelu: whether y = GELU(x·Wᵀ + b), in its tanh form.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Called with x (…, K) in that dtype it returns (…, N). `backend` is the one that serves; `packed_by_us` says whether
    it does so with our kernel; `nbytes` is what this object holds beside the weight that it was given: the packed or
    converted copy. There is no gradient.

    Raises TypeError for an argument that is no tensor, and for a dtype that is not supported or, of x, not that of the
    layer; ValueError for a wrong shape, device or backend; RuntimeError where a gradient would be needed.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, dtype: torch.dtype | None = None,
        gelu: bool = False, backend: str = "auto",
    ) -> None:  # fmt: skip
        check_tensor("weight", weight, rank=2)
        self.out_features, self.in_features = weight.shape
        if bias is not None:
            check_tensor("bias", bias)
            check_shape("bias", bias, (self.out_features,))
            check(bias.device == weight.device, "bias", f"device {weight.device} like weight", bias.device)
        self.dtype, self.device, self.gelu = dtype or weight.dtype, weight.device, gelu
        check_dtype("dtype", self.dtype)
        self.backend = resolve("packed_linear", backend, self.device.type, self.dtype)
        if weight.numel() == 0:
            self.backend = "reference"  # there is nothing to pack
        weight = weight.detach()
        self._bias = None if bias is None else bias.detach().to(self.dtype)
        self.packed_by_us = self.backend == "cpu" and packing.kernel_unavailable_reason(self.dtype) is None
        if self.packed_by_us:
            self._weight = _pack(weight, self.dtype)
            addend = torch.zeros(self.out_features) if bias is None else self._bias.float()
            self._bias = F.pad(addend, (0, -self.out_features % _COLUMNS))
        elif self.backend == "cpu":
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous())
        else:
            self._weight = weight.to(self.dtype)
        self._copied = self.backend == "cpu" or self.dtype != weight.dtype
        self._epilogue = ("gelu", [], "tanh") if gelu else ("none", [], "")

    @property
    def nbytes(self) -> int:
        """Bytes of the packed or converted copy, 0 where the weight itself is used."""
        return self._weight.nbytes if self._copied else 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        check_tensor("x", x)
        if x.dtype != self.dtype:
            raise TypeError(f"x: expected {self.dtype} like the layer, got {x.dtype}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected shape (…, {self.in_features}), got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"x: expected device {self.device} like the weight, got {x.device}")
        refuse_gradients("PackedLinear", x)
        if self.backend == "reference":
            return _reference.packed_linear(x, self._weight, self._bias, self.gelu)
        if not self.packed_by_us:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, *self._epilogue)
        rows = x.reshape(-1, self.in_features)
        if lacking := -self.in_features % _inputs_together(self.dtype):
            rows = F.pad(rows, (0, lacking))
        y = torch.ops.var_kernels._packed_linear(
            rows.contiguous(), self._weight, self._bias, self.out_features, self.gelu
        )
        return y.view(*x.shape[:-1], self.out_features)
