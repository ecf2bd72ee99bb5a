"""GroupNorm and SiLU of channels-last images in one op, as they stand between the convolutions of a decoder.

There is a kernel for CPUs only, where PyTorch's own GroupNorm of channels-last images computes E[x²] − E[x]² in fp32
and is wrong in the sixth digit. On a GPU the reference serves, which calls PyTorch's two kernels.
"""

import torch

from .._checks import check, check_image_out, check_tensor, refuse_gradients
from ..backends import resolve
from ..native.library import define, register_fake
from ..reference import group_norm_silu as _reference

# x and y are (B, pixels, C), dense; y is written, and may be x.
define(
    "_group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, bool silu, Tensor(a!) y) -> ()",
    __name__,
)


@register_fake("_group_norm_silu")
def _(x, weight, bias, groups, eps, silu, y):
    return None


def group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, *, eps: float = 1e-6, silu: bool = True,
    out: torch.Tensor | None = None, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Normalises groups of channels over all pixels, then applies y·sigmoid(y).

    y = (x − mean)·rstd·weight[c] + bias[c], with mean and variance over the pixels and the C/groups channels of each
    group of each sample, and rstd = 1 / sqrt(variance + eps). The result is y·sigmoid(y), or y with `silu=False`.

    Args:
        x: (B, C, H, W), float32, bfloat16 or float16 (float64 is served by the reference). If it is not dense with
            its channels last, it is copied once.
        weight, bias: (C,) float32 (beside a float64 x any supported dtype).
        groups: a divisor of C.
        eps: added to the variance.
        silu: whether y·sigmoid(y) follows the normalisation.
        out: a tensor of the shape, dtype and layout of the result, which is written to; it may be x itself.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Returns:
        (B, C, H, W) in the dtype of x, dense with its channels last. Arithmetic is fp32 (fp64 for float64), and the
        result is rounded once. The order of summation depends on the shape only.

    For inference: there is no gradient.

    Raises:
        TypeError: for an argument that is not a tensor, or of an unsupported dtype.
        ValueError: for a wrong shape, device, number of groups or backend, and for an `out` of another layout.
        RuntimeError: if a gradient would be needed.

    Source: Wu and He, "Group normalization" (arXiv 1803.08494), as in the decoders of VQGAN and VAR.
    """
    check_tensor("x", x, rank=4)
    batch, channels, height, width = x.shape
    check(groups > 0 and channels % groups == 0, "groups", f"a divisor of the {channels} channels", groups)
    for argument, tensor in (("weight", weight), ("bias", bias)):
        check_tensor(argument, tensor)
        check(tuple(tensor.shape) == (channels,), argument, f"shape {(channels,)}", tuple(tensor.shape))
        check(tensor.device == x.device, argument, f"device {x.device} like x", tensor.device)
        if tensor.dtype != torch.float32 and x.dtype != torch.float64:
            raise TypeError(f"{argument}: expected torch.float32, got {tensor.dtype}")
    if out is None:
        out = torch.empty_like(x, memory_format=torch.channels_last)
    else:
        check_image_out(out, x.shape, x)
    refuse_gradients("group_norm_silu", x, weight, bias, out)
    if x.numel() == 0:
        return out
    if resolve("group_norm_silu", backend, x.device.type, x.dtype) == "reference":
        return out.copy_(_reference.group_norm_silu(x, weight, bias, groups, eps, silu))
    dense = x.contiguous(memory_format=torch.channels_last)
    rows, y = (image.permute(0, 2, 3, 1).view(batch, height * width, channels) for image in (dense, out))
    torch.ops.var_kernels._group_norm_silu(rows, weight, bias, groups, eps, silu, y)
    return out
