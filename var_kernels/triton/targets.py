"""What the choice of a configuration needs to know about a GPU."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """One kind of GPU.

    `api` is "cuda" or "hip". `arch` is the compute capability times ten (80, 90, ...), or the gfx name of an AMD GPU.
    `shared_memory` is the number of bytes that one block may use, `multiprocessors` how many the GPU has. `device` is
    the name of a GPU that is present, or "" for one of the table below.
    """

    name: str
    api: str
    arch: int | str
    shared_memory: int
    multiprocessors: int
    warp_size: int = 32
    device: str = ""


# Shared memory per block: CUDA C++ Programming Guide, table of technical specifications per compute capability; LDS of
# CDNA 2 and 3: 64 KiB. Multiprocessors of A100, RTX 3090, RTX 4090, H100 SXM, B200, RTX 5090, MI250X (one die), MI300X.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 163 << 10, 108),
        Target("sm_86", "cuda", 86, 99 << 10, 82),
        Target("sm_89", "cuda", 89, 99 << 10, 128),
        Target("sm_90", "cuda", 90, 227 << 10, 132),
        Target("sm_100", "cuda", 100, 227 << 10, 148),
        Target("sm_120", "cuda", 120, 99 << 10, 170),
        Target("gfx90a", "hip", "gfx90a", 64 << 10, 110, warp_size=64),
        Target("gfx942", "hip", "gfx942", 64 << 10, 304, warp_size=64),
    )
}

_assumed: contextvars.ContextVar[Target | None] = contextvars.ContextVar("assumed", default=None)


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Inside this context, configurations are chosen for `target` on any machine. It is for reports and tests."""
    token = _assumed.set(target)
    try:
        yield
    finally:
        _assumed.reset(token)


def target_of(device: torch.device) -> Target:
    """The target that describes `device`, or the one that `assume` names."""
    return _assumed.get() or _read(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _read(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    multiprocessors, device = properties.multi_processor_count, properties.name
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        warp_size = getattr(properties, "warp_size", 64)
        return Target(arch, "hip", arch, 64 << 10, multiprocessors, warp_size, device)
    arch = properties.major * 10 + properties.minor
    # An architecture that the table does not have gets the shared memory that torch reports, or the least of all cards.
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return Target(f"sm_{arch}", "cuda", arch, shared, multiprocessors, device=device)
