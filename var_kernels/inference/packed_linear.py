"""A linear layer for inference: weights packed once, bias and GELU in the epilogue.

`F.linear` hands fp32 weights as they are to BLAS in every call, and reaches 40 % of the multiply-add peak of an AMD
server. With weights stored in the order in which they are read, 85 to 92 % are reached, and two rows take a quarter of
the time.
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
# Writes the packed form of weight (N, K), dense, float32 or bfloat16, to `packed`.
define("_pack_linear(Tensor weight, Tensor(a!) packed) -> ()", __name__)
_COLUMNS = 16  # a constant of packed_linear.h; a test compares it


@register_fake("_pack_linear")
def _(weight, packed):
    return None


@register_fake("_packed_linear")
def _(x, packed, bias, out_features, gelu):
    return x.new_empty(x.shape[0], out_features)


def _inputs_together(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1


def _pack(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) by strips of outputs; in each strip input after input, in each input the outputs of the strip.

    Outputs are padded with zeros to a multiple of 16. In bf16 two inputs form a pair, and the last pair may be padded
    with a zero. packed_linear.h defines the strips.
    """
    outputs, inputs = weight.shape
    elements = (outputs + -outputs % _COLUMNS) * (inputs + -inputs % _inputs_together(dtype))
    packed = huge_pages.zeros(elements, dtype=dtype)
    if weight.dtype not in (torch.float32, torch.bfloat16):
        weight = weight.float()
    torch.ops.var_kernels._pack_linear(weight.contiguous(), packed)
    return packed


class PackedLinear(packing.Packed):
    """y = x·Wᵀ + b, or tanh-GELU of that, with W in the order in which the kernel reads it.

    Backend `cpu` multiplies packed weights. It uses our own kernel on x86-64 processors, in fp32 from AVX2 on and in
    bf16 with the bf16 products of AVX-512; elsewhere, and in bf16 on processors with AMX, it uses oneDNN's. Backend
    `reference` is `F.linear` with the weight itself. There is no kernel for GPUs.

    Args:
        weight: (N, K), any floating-point dtype. If it is packed, it is read once and not kept, so later changes of it
            have no effect.
        bias: (N,), any floating-point dtype, or None.
        dtype: the dtype of x and of the result, to which weight and bias are converted; None means that of the weight.
            `cpu` serves float32 and bfloat16.
        gelu: whether y = GELU(x·Wᵀ + b), in its tanh form.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Calling the object with x (…, K) in that dtype returns (…, N); there is no gradient. Backend `cpu` sums in fp32 and
    rounds the result once. The attribute `backend` names the backend that serves, `packed_by_us` says whether our own
    kernel does, and `nbytes` is the size in bytes of the packed or converted copy that the object holds beside the
    given weight.

    Raises:
        TypeError: for an argument that is not a tensor, an unsupported dtype, or an x whose dtype is not the layer's.
        ValueError: for a wrong shape, device or backend.
        RuntimeError: if a gradient would be needed.

    Source: GELU in its tanh form is that of Hendrycks and Gimpel (arXiv 1606.08415).
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
            self._weight = torch.ops.mkldnn._reorder_linear_weight(packing.converted(weight, self.dtype))
        else:
            self._weight = weight.to(self.dtype)
        self._copied = self.backend == "cpu" or self.dtype != weight.dtype
        self._epilogue = ("gelu", [], "tanh") if gelu else ("none", [], "")

    @property
    def nbytes(self) -> int:
        """Bytes of the packed or converted copy; 0 if the weight itself is used."""
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
