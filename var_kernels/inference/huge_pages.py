"""CPU memory in huge pages, for data that is read in long streams: an entry of the TLB then covers 2 MiB, not 4 KiB."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

_HUGE = 2 << 20


def zeros(*shape: int, dtype: torch.dtype, device: str | torch.device = "cpu") -> torch.Tensor:
    """Like `torch.zeros`, but in huge pages on a CPU if Linux grants them on request.

    Huge pages are requested only for the part of the tensor that fills them; the rest, less than 2 MiB, lies in small
    ones.
    """
    size = math.prod(shape) * dtype.itemsize
    whole = size // _HUGE * _HUGE
    if whole == 0 or torch.device(device).type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE
    with contextlib.suppress(OSError):  # the operating system has no huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)
