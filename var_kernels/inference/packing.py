"""Decides what multiplies packed weights of linear layers on this CPU: our kernel, or oneDNN's where that is faster."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from ..native import load

# The ISA levels at which our kernel is the fastest.
_LEVELS = {torch.float32: ("avx2", "avx512", "avx512_bf16", "amx"), torch.bfloat16: ("avx512_bf16",)}

_OPS = ("_reorder_linear_weight", "_linear_pointwise")


def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of this dtype, float32 or bfloat16, are not packed; None if they are.

    oneDNN, which is part of torch, packs them where the native library is not available.
    """
    if kernel_unavailable_reason(dtype) is None:
        return None
    return _no_onednn() or (_no_bf16() if dtype == torch.bfloat16 else None)


def kernel_unavailable_reason(dtype: torch.dtype) -> str | None:
    """Why weights of this dtype, float32 or bfloat16, are packed for oneDNN instead of our own kernel; None if not."""
    status = load.native_library()
    if not status.available:
        return f"the native library is not available: {status.reason}"
    if status.isa in _LEVELS[dtype]:
        return None
    if status.isa == "amx":
        return "oneDNN multiplies on the tile registers"
    return f"there is none for this dtype at ISA level {status.isa}"


def packer(dtype: torch.dtype) -> str:
    """A phrase that says what multiplies weights of this dtype on a CPU, and why nothing faster does."""
    ours = kernel_unavailable_reason(dtype)
    reason = unavailable_reason(dtype)
    served = "our kernel" if ours is None else "oneDNN" if reason is None else f"F.linear ({reason})"
    return served if ours is None or reason is not None else f"{served} (our kernel: {ours})"


_conversion = threading.local()


@contextmanager
def reused_memory() -> Iterator[None]:
    """Inside, this thread converts one weight after another in the same memory.

    malloc would take new pages for each, which takes twice as long as converting and packing.
    """
    _conversion.memory = torch.empty(0, dtype=torch.uint8)
    try:
        yield
    finally:
        del _conversion.memory


def converted(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight, dense and in `dtype`. Inside of `reused_memory` it is valid until the next call only."""
    memory = getattr(_conversion, "memory", None)
    if memory is None or weight.dtype == dtype:
        return weight.to(dtype).contiguous()
    size = weight.numel() * dtype.itemsize
    if memory.numel() < size:
        memory = _conversion.memory = torch.empty(size, dtype=torch.uint8)
    return memory[:size].view(dtype).view(weight.shape).copy_(weight)


class Packed:
    """Weights in a form of this processor. Nothing changes them, so a copy is the object itself."""

    def __copy__(self):
        return self

    def __deepcopy__(self, memo: dict):
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} is made for the processor that it was built on, and cannot be "
                        "pickled: pickle the weight, and build another one from it")


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
