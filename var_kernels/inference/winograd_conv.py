"""3×3 convolutions of channels-last images for inference, with fewer products than outputs times taps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .._checks import check, check_dtype, check_image_out, check_same, check_shape, check_tensor, refuse_gradients
from ..backends import resolve
from ..native import load
from ..native.library import define, register_fake
from ..reference import winograd_conv as _reference
from . import huge_pages

# x is (B, H, W, C_in), y (B, H', W', C_out), dense; the packed weights are those of `_pack`. y is written, and may be
# the residual.
define(
    "_winograd_conv(Tensor x, Tensor packed, Tensor bias, Tensor? residual, int scheme, Tensor(a!) y) -> ()", __name__
)
_STRIP, _COLUMNS, _DEPTH = 80, 16, 32  # of winograd_conv.h, compared by a test
_CACHED_BYTES = 32 << 20  # a common last-level cache


class Scheme(NamedTuple):
    """A form of minimal filtering."""

    name: str
    filters: list[list[float]]  # in one direction: from three taps to points
    outputs: int  # of a tile, in one direction
    scale: int  # outputs for each input

    @property
    def points(self) -> int:
        return len(self.filters) ** 2

    @property
    def products_per_input(self) -> float:
        """For each input channel and output channel."""
        return self.points * (self.scale / self.outputs) ** 2


def _four_outputs(a: float = 5 / 8, b: float = 3 / 2) -> list[list[float]]:
    """(1, x, x²) of the points 0, ±a, ±b over the product of the distances to the others; and of infinity."""
    at_a, at_b = 2 * a**2 * (a**2 - b**2), 2 * b**2 * (b**2 - a**2)
    points = [[x**i / scale for i in range(3)] for x, scale in ((a, at_a), (-a, at_a), (b, at_b), (-b, at_b))]
    return [[1 / (a * b) ** 2, 0, 0], *points, [0, 0, 1]]


_TWO, _FOUR, _DOUBLING = range(3)  # the raw op's argument `scheme`
SCHEMES = (
    Scheme("two", [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]], 2, 1),
    Scheme("four", _four_outputs(), 4, 1),
    Scheme("doubling", [[1, 0, 0], [1, 1, 1], [0, 0, 1]], 2, 2),
)


@register_fake("_winograd_conv")
def _(x, packed, bias, residual, scheme, y):
    return None


def choose(out_channels: int, in_channels: int, dtype: torch.dtype, doubling: bool) -> tuple[int, torch.dtype]:
    """The scheme, and in which dtype numbers are multiplied: bfloat16 as such where the processor can."""
    pairs = dtype == torch.bfloat16 and load.native_library().isa in ("avx512_bf16", "amx")
    if doubling:
        scheme = _DOUBLING
    elif pairs or 4 * SCHEMES[_FOUR].points * out_channels * in_channels > _CACHED_BYTES:
        scheme = _TWO
    else:
        scheme = _FOUR
    return scheme, torch.bfloat16 if pairs else torch.float32


def prepared_bytes(
    out_channels: int, in_channels: int, dtype: torch.dtype, doubling: bool = False,
    device: str | torch.device = "cpu", backend: str = "auto",
) -> int:  # fmt: skip
    """Bytes of the weights that a :class:`PackedConv3x3` holds."""
    if resolve("winograd_conv", backend, torch.device(device).type, dtype) == "reference":
        return out_channels * in_channels * 9 * dtype.itemsize
    scheme, packed = choose(out_channels, in_channels, dtype, doubling)
    padded = (out_channels + -out_channels % _COLUMNS) * (in_channels + -in_channels % _DEPTH)
    return SCHEMES[scheme].points * padded * packed.itemsize


def _pack(weight: torch.Tensor, scheme: int, dtype: torch.dtype) -> torch.Tensor:
    """Strips of 80 output channels, in each the points, in each the input channels (bf16: in pairs), in each the strip.

    Both channel counts are padded with zeros.
    """
    taps = torch.tensor(SCHEMES[scheme].filters, dtype=torch.float64)
    points = torch.einsum("pi,qj,ocij->pqco", taps, taps, weight.double()).flatten(0, 1)
    _, depth, columns = points.shape
    points = F.pad(points, (0, -columns % _COLUMNS, 0, -depth % _DEPTH))
    if dtype == torch.bfloat16:
        points = points.unflatten(1, (-1, 2)).transpose(2, 3)
    else:
        points = points.unsqueeze(3)
    return huge_pages.filled(points.numel(), points.to(dtype).split(_STRIP, dim=2), dtype)


class PackedConv3x3:
    """y = conv(x, weight) + bias [+ residual]: 3×3, stride 1, padded by one zero, with weights prepared once.

    With `doubling` x is first doubled in height and width by nearest neighbour, without being stored like that.

    In backend `cpu` the products are those of minimal filtering: F(4×4, 3×3), 36 for 16 outputs, where its weights stay
    in a last-level cache; F(2×2, 3×3), 16 for 4 outputs, elsewhere and wherever bfloat16 is multiplied as such; 9 for 4
    outputs with `doubling`. Sums are fp32. Backend `reference` is `F.conv2d`. There is no kernel for GPUs.

    Args:
        weight: (O, C, 3, 3), any floating-point dtype. Read now; what `cpu` holds does not show later changes of it.
        bias: (O,), any floating-point dtype.
        dtype: of x and of the result; None: that of the weight. `cpu` serves float32 and bfloat16.
        doubling: see above.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Called with x (B, C, H, W) of that dtype, and optionally a residual like the result, it returns (B, O, H, W), or
    (B, O, 2H, 2W), channels last. Inputs that are not dense with their channels last are copied. `out`, a tensor like
    the result, is written to and returned; it may be the residual, not x. `backend` is the one that serves, `nbytes`
    says what this object holds. There is no gradient.

    Errors: rms against exact arithmetic, times that of PyTorch's direct convolution with channels last in the same
    dtype: fp32 F(4×4) 1.8, fp32 F(2×2) 0.6, bfloat16 1.4; with channels first PyTorch's fp32 is 2.8 times better.

    Raises TypeError for an argument that is no tensor or of another dtype, ValueError for a wrong shape, device, layout
    or backend; RuntimeError where a gradient would be needed.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308).
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, *, dtype: torch.dtype | None = None, doubling: bool = False,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        check_tensor("weight", weight, rank=4)
        check(tuple(weight.shape[2:]) == (3, 3) and weight.numel() > 0, "weight", "shape (O, C, 3, 3)",
              tuple(weight.shape))  # fmt: skip
        check_tensor("bias", bias)
        check(tuple(bias.shape) == (len(weight),), "bias", f"shape {(len(weight),)}", tuple(bias.shape))
        check(bias.device == weight.device, "bias", f"device {weight.device} like weight", bias.device)
        self.out_channels, self.in_channels = weight.shape[:2]
        self.dtype, self.device, self.doubling = dtype or weight.dtype, weight.device, doubling
        check_dtype("dtype", self.dtype)
        self.backend = resolve("winograd_conv", backend, self.device.type, self.dtype)
        weight = weight.detach()
        if self.backend == "cpu":
            self.scheme, packed_dtype = choose(self.out_channels, self.in_channels, self.dtype, doubling)
            self._weight, self._bias = _pack(weight, self.scheme, packed_dtype), bias.detach().float()
        else:
            self._weight = weight.to(self.dtype, memory_format=torch.channels_last)
            self._bias = bias.detach().to(self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared weights."""
        return self._weight.nbytes

    def shape_of(self, x: torch.Tensor) -> torch.Size:
        """The shape of the result for x (B, C, H, W)."""
        scale = 2 if self.doubling else 1
        return torch.Size((x.shape[0], self.out_channels, x.shape[2] * scale, x.shape[3] * scale))

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_tensor("x", x, rank=4)
        if x.dtype != self.dtype:
            raise TypeError(f"x: expected {self.dtype}, got {x.dtype}")
        check(x.shape[1] == self.in_channels, "x", f"shape (B, {self.in_channels}, H, W)", tuple(x.shape))
        check(x.device == self.device, "x", f"device {self.device} like the weight", x.device)
        shape = self.shape_of(x)
        if residual is not None:
            check_tensor("residual", residual)
            check_shape("residual", residual, shape)
            check_same("x", x, residual=residual)
        if out is not None:
            check_image_out(out, shape, x)
            check(out.data_ptr() != x.data_ptr() or x.numel() == 0, "out", "memory of its own", "that of x")
        refuse_gradients("PackedConv3x3", x, residual, out)
        if self.backend == "cpu":
            if out is None:
                out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
            torch.ops.var_kernels._winograd_conv(
                _channels_last(x), self._weight, self._bias, None if residual is None else _channels_last(residual),
                self.scheme, _channels_last(out),
            )  # fmt: skip
            return out
        x = x.contiguous(memory_format=torch.channels_last)
        y = _reference.winograd_conv(x, self._weight, self._bias, residual, self.doubling)
        y = y.contiguous(memory_format=torch.channels_last)
        return y if out is None else out.copy_(y)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
