"""Executors for `Emulation.run` that execute the PTX which nvcc writes, in the PTX interpreter.

The emulation runs the code that g++ makes of a kernel, with the assembly of `device.cuh` replaced. These executors run
the assembly itself, and the predicates and vector widths of nvcc's code, on the same memory.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np

from tools.gpu_emulation import ptx

from . import Launch, nvcc

__all__ = ["execute_ptx_of"]


@functools.cache
def _kernels(source: Path, arch: str) -> dict[str, ptx.Kernel]:
    """The kernels of a .cu file by their plain names."""
    kernels = ptx.parse(nvcc.output(source, arch, "ptx").read_text()).kernels
    return dict(zip(nvcc.plain_names(list(kernels)), kernels.values(), strict=True))


def execute_ptx_of(*sources: Path, arch: str = "sm_80"):
    """An executor for the kernels of these files."""
    written: dict[tuple[int, int], np.ndarray] = {}  # bounds of a buffer -> what the previous launch left defined

    def execute(launch: Launch) -> None:
        kernel = next(found[launch.kernel] for source in sources if launch.kernel in (found := _kernels(source, arch)))
        memory, undefined = _memory(launch, written)
        ptx.run(
            kernel, launch.parameters,
            grid=launch.grid, threads=launch.block, shared_bytes=launch.shared_bytes, memory=memory,
        )  # fmt: skip
        written.clear()
        written.update({bounds: memory.defined(name) for bounds, name in undefined.items()})

    return execute


def _memory(launch: Launch, written: dict) -> tuple[ptx.Memory, dict[tuple[int, int], str]]:
    """The launch's buffers as memory, and the names of the buffers that are not fully defined, by their bounds.

    Overlapping views, such as chunks of one tensor, become one buffer.
    """
    merged: list[tuple[int, int, str, bool]] = []
    for begin, end, name, undefined in sorted(launch.buffers):
        if merged and begin < merged[-1][1]:
            first, last, names, _ = merged.pop()
            merged.append((first, max(last, end), f"{names}, {name}", False))
        else:
            merged.append((begin, end, name, undefined))
    memory, partly = ptx.Memory(), {}
    for index, (begin, end, name, undefined) in enumerate(merged):
        array = np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))
        memory.add(f"{name} #{index}", array, defined=written.get((begin, end), False) if undefined else True)
        if undefined:
            partly[begin, end] = f"{name} #{index}"
    return memory, partly
