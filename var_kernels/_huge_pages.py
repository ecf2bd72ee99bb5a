"""Memory of a CPU for what is read in long streams: of huge pages an entry of the TLB serves 2 MiB, not 4 KiB."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

_HUGE = 2 << 20


def zeros(*shape: int, dtype: torch.dtype, device: str | torch.device = "cpu") -> torch.Tensor:
    """Like `torch.zeros`; on a CPU in huge pages, where Linux gives them to whoever asks.

    Only pages that are filled are asked for: the rest of the tensor, less than 2 MiB, is in small ones.
    """
    size = math.prod(shape) * dtype.itemsize
    whole = size // _HUGE * _HUGE
    if whole == 0 or torch.device(device).type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, start, whole)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


def copied(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The elements of all pieces, one after another, in a new vector."""
    whole = zeros(sum(piece.numel() for piece in pieces), dtype=pieces[0].dtype)
    for piece, place in zip(pieces, whole.split([piece.numel() for piece in pieces]), strict=True):
        place.view(piece.shape).copy_(piece)
    return whole
