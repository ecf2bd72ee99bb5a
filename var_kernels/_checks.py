"""Validation of the arguments of every public function: one message format, the same exceptions everywhere."""

from collections.abc import Sequence
from operator import index

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raises ValueError `<argument>: expected <expected>, got <got>` unless the condition holds."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def check_tensor(argument: str, tensor: object, *, rank: int | None = None) -> None:
    """Raises TypeError unless `tensor` is a floating-point tensor of a supported dtype, ValueError for a wrong rank."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor, got {type(tensor).__name__}")
    if rank is not None and tensor.dim() != rank:
        raise ValueError(f"{argument}: expected {rank} dimensions, got shape {tuple(tensor.shape)}")
    check_dtype(argument, tensor.dtype)


def check_dtype(argument: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless `dtype` is one of :data:`FLOATS`."""
    if dtype not in FLOATS:
        raise TypeError(f"{argument}: expected float32, bfloat16, float16 or float64, got {dtype}")


def check_same(reference: str, first: torch.Tensor, **others: torch.Tensor) -> None:
    """Raises TypeError unless every other tensor has the dtype of `first`, ValueError unless it has its device.

    `reference` is the name of `first` in the messages.
    """
    for argument, tensor in others.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{argument}: expected {first.dtype} like {reference}, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{argument}: expected device {first.device} like {reference}, got {tensor.device}")


def same_floats(first: object, *others: object) -> bool:
    """Whether all are tensors of one supported dtype on one device: no further check of dtype or device is needed."""
    if not isinstance(first, torch.Tensor):
        return False
    dtype, device = first.dtype, first.device
    if dtype not in FLOATS:
        return False
    for tensor in others:
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype or tensor.device != device:
            return False
    return True


def check_image_out(out: object, shape: Sequence[int], like: torch.Tensor) -> None:
    """Checks `out`, to which images are written: `shape`, the dtype and device of `like`, and dense with channels last.

    Raises TypeError for a wrong dtype, ValueError for the rest.
    """
    check_tensor("out", out)
    check_shape("out", out, shape)
    check_same("the result", like, out=out)
    dense = out.is_contiguous(memory_format=torch.channels_last)
    check(dense, "out", "a dense tensor with its channels last", f"strides {out.stride()}")


def refuse_gradients(name: str, *tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError if autograd would need a gradient of the op `name` with respect to one of these tensors."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{name}: has no gradient; call it under torch.no_grad() or torch.inference_mode()")


def as_int(number: object) -> int:
    """The int that `operator.index` gives. A symbolic int of compiled code stays symbolic: index() would give the value
    of this call, and the code would be compiled again for every other value."""
    return number if isinstance(number, int | torch.SymInt) else index(number)


def check_shape(argument: str, tensor: torch.Tensor, *shapes: Sequence[int]) -> None:
    """Raises ValueError unless the tensor has one of the given shapes."""
    if not any([tuple(tensor.shape) == tuple(shape) for shape in shapes]):
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{argument}: expected shape {expected}, got {tuple(tensor.shape)}")


def unit_inner_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is dense, else a copy. The kernels take any strides of the others."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
