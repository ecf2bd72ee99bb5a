"""Tile sizes, warps and pipeline stages of every kernel: one table, read from the top.

A row serves a launch if the problem's size and element size are at most those of the row, and the GPU has the row's
API, at least its shared memory per block and at least its architecture. The first such row counts, so rows for roomy
GPUs stand above those for any GPU. No value here was measured yet: each is what the compiler's report bears out (no
spills, fits the card, keeps the tensor cores busy by its static bound).

`override` replaces a row's choice in a program; see :func:`choose`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .targets import Target


@dataclass(frozen=True)
class Config:
    """Constexpr arguments of a kernel and the options of its launch."""

    tiles: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """`config` for problems up to `size` (a kernel says what that is) of elements up to `itemsize` bytes."""

    config: Config
    size: int = 1 << 30
    itemsize: int = 4
    api: str | None = None
    shared_memory: int = 0  # bytes per block that the GPU must have
    arch: int = 0  # for the cuda API

    def serves(self, target: Target, size: int, itemsize: int) -> bool:
        return (
            size <= self.size
            and itemsize <= self.itemsize
            and self.api in (None, target.api)
            and self.shared_memory <= target.shared_memory
            and (target.api != "cuda" or self.arch <= target.arch)
        )


TABLE: dict[str, tuple[Row, ...]] = {}

# For the whole process: the backward of an op runs in threads of autograd, where no context variable would be seen.
_overrides: dict[str, Config] = {}


def choose(kernel: str, target: Target, size: int, itemsize: int) -> Config:
    """The configuration of `kernel`, "<stem>.<function>", for a problem on a target."""
    if (config := _overrides.get(kernel)) is not None:
        return config
    for row in TABLE[kernel]:
        if row.serves(target, size, itemsize):
            return row.config
    raise ValueError(f"{kernel}: expected a size that the table of configurations serves on {target.name}, got {size}")


@contextlib.contextmanager
def override(configs: Mapping[str, Config]) -> Iterator[None]:
    """Use these configurations, by "<stem>.<function>", inside this context, in every thread, whatever the table says.

    Raises ValueError for a kernel that the table does not have.
    """
    unknown = sorted(set(configs) - set(TABLE))
    if unknown:
        raise ValueError(f"configs: expected kernels of the table, {', '.join(TABLE)}, got {', '.join(unknown)}")
    previous = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(previous)
