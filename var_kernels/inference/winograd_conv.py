"""3×3 convolutions of channels-last images for inference, with fewer products than outputs times taps."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._checks import check, check_dtype, check_image_out, check_same, check_shape, check_tensor, refuse_gradients
from ..backends import resolve
from ..native import load
from ..native.library import define, register_fake
from ..reference import winograd_conv as _reference
from . import huge_pages
from .packing import Packed

# x is (B, H, W, C_in), y (B, H', W', C_out), dense; the packed weights are those of `_pack`. y is written to, and may
# be the residual.
define(
    "_winograd_conv(Tensor x, Tensor packed, Tensor bias, Tensor? residual, int scheme, Tensor(a!) y) -> ()", __name__
)
# Writes the transformed and packed form of weight (C_out, C_in, 3, 3), dense float32, to `packed`; transform is the
# matrix `Scheme.filters` in float64.
define("_pack_winograd(Tensor weight, Tensor transform, Tensor(a!) packed) -> ()", __name__)
_COLUMNS, _DEPTH = 16, 32  # constants of winograd_conv.h; a test compares them
_CACHED_BYTES = 32 << 20  # the size of a common last-level cache


class Scheme(NamedTuple):
    """A form of minimal filtering, described in one of the two directions."""

    name: str
    filters: list[list[float]]  # (points, 3): the matrix that transforms three taps to the points
    outputs: int  # outputs of one tile
    scale: int  # outputs for each input: 2 if the image is doubled first

    @property
    def points(self) -> int:
        return len(self.filters) ** 2

    @property
    def products_per_input(self) -> float:
        """Multiplications per input pixel, for each pair of input channel and output channel."""
        return self.points * (self.scale / self.outputs) ** 2


def _four_outputs(a: float = 5 / 8, b: float = 3 / 2) -> list[list[float]]:
    """The filter transform of F(4, 3) with the points 0, ±a, ±b and infinity.

    The row of a finite point x is (1, x, x²), divided by the product of its differences from the other finite points.
    """
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


@register_fake("_pack_winograd")
def _(weight, transform, packed):
    return None


def choose(out_channels: int, in_channels: int, dtype: torch.dtype, doubling: bool) -> tuple[int, torch.dtype]:
    """The index of the scheme, and the dtype in which numbers are multiplied: bfloat16 if the processor can."""
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
    return SCHEMES[scheme].points * _padded(out_channels, in_channels) * packed.itemsize


def _pack(weight: torch.Tensor, scheme: int, dtype: torch.dtype) -> torch.Tensor:
    """The transformed weights by strips of 80 output channels.

    In each strip lies point after point, in each point input channel after input channel (in bf16: pair after pair),
    and in each of these the output channels of the strip. Both channel counts are padded with zeros. The transform is
    computed in float64 and rounded once.
    """
    transform = torch.tensor(SCHEMES[scheme].filters, dtype=torch.float64)
    packed = huge_pages.zeros(_padded(*weight.shape[:2]) * SCHEMES[scheme].points, dtype=dtype)
    torch.ops.var_kernels._pack_winograd(weight.float().contiguous(), transform, packed)
    return packed


def _padded(out_channels: int, in_channels: int) -> int:
    return (out_channels + -out_channels % _COLUMNS) * (in_channels + -in_channels % _DEPTH)


class PackedConv3x3(Packed):
    """y = conv(x, weight) + bias [+ residual]: 3×3, stride 1, padded by one zero, with weights prepared once.

    With `doubling`, the convolution is that of x doubled in height and width by nearest neighbour; the doubled image is
    never stored.

    Backend `cpu` computes the convolution by minimal filtering, with fp32 sums. F(4×4, 3×3) takes 36 products for 16
    outputs and is used if its weights stay in a last-level cache. F(2×2, 3×3) takes 16 products for 4 outputs and is
    used otherwise, and wherever bfloat16 is multiplied as such. With `doubling` there are 9 products for 4 outputs.
    Backend `reference` is `F.conv2d`. There is no kernel for GPUs.

    Args:
        weight: (O, C, 3, 3), any floating-point dtype. `cpu` reads it once, so later changes of it have no effect.
        bias: (O,), any floating-point dtype.
        dtype: the dtype of x and of the result; None means that of the weight. `cpu` serves float32 and bfloat16.
        doubling: whether x is doubled first, see above.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Calling the object with x (B, C, H, W) in that dtype, and optionally a residual of the shape and dtype of the
    result, returns (B, O, H, W), or (B, O, 2H, 2W) with `doubling`, dense with its channels last. Inputs of another
    layout are copied. `out`, a tensor of the shape, dtype and layout of the result, is written to and returned; it may
    be the residual, but not x. The attribute `backend` names the backend that serves, and `nbytes` is the size of the
    prepared weights in bytes. There is no gradient.

    The rms error against exact arithmetic, as a multiple of that of PyTorch's direct convolution with channels last in
    the same dtype, is 1.8 for fp32 F(4×4), 0.6 for fp32 F(2×2) and 1.4 for bfloat16. With channels first, PyTorch's
    fp32 error is 2.8 times smaller.

    Raises:
        TypeError: for an argument that is not a tensor, or of an unsupported or different dtype.
        ValueError: for a wrong shape, device, layout or backend.
        RuntimeError: if a gradient would be needed.

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
