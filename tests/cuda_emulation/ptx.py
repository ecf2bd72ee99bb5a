"""Launches of the doors executed from the PTX that nvcc writes, in the PTX interpreter: executors for `Emulation.run`.

The emulation runs what g++ makes of a kernel, with the assembly of `device.cuh` replaced; here the assembly itself, the
predicates and the vector widths of nvcc's code are executed, on the same memory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from pathlib import Path

import numpy as np
import ptx_interpreter

from var_kernels import _build

from . import Launch, plain_name
from .build import _torch_includes

__all__ = ["execute_ptx_of", "nvcc_output"]


def nvcc_output(source: Path, arch: str, kind: str) -> Path:
    """What nvcc makes of a .cu file for `arch` ("sm_80"): `kind` is "ptx" or "cubin". Kept in the cache.

    Raises BuildUnavailable without nvcc, RuntimeError with its output where it fails.
    """
    nvcc = _build.find_nvcc()
    if nvcc is None:
        raise _build.BuildUnavailable("nvcc is not installed")
    command = f"{nvcc.command} -O3 -std=c++20 -arch={arch} -{kind} -I{_build.CSRC} {_torch_includes()}"
    digest = hashlib.sha256(f"{command} {nvcc.release}".encode())
    for path in _build._with_includes(source, []):
        digest.update(path.read_bytes())
    directory = _build.cache_root() / "cuda_emulation"
    directory.mkdir(parents=True, exist_ok=True)
    output = directory / f"{source.stem}-{arch}-{digest.hexdigest()[:20]}.{kind}"
    if not output.is_file():
        temporary = output.with_name(f".{os.getpid()}-{output.name}")
        answer = subprocess.run([*command.split(), str(source), "-o", str(temporary)], capture_output=True, text=True)
        if answer.returncode:
            raise RuntimeError(f"{command} {source} failed:\n{answer.stderr[-6000:]}")
        os.replace(temporary, output)
    return output


@functools.cache
def _kernels(source: Path, arch: str) -> dict[str, ptx_interpreter.Kernel]:
    """The kernels of a .cu file by their plain names."""
    module = ptx_interpreter.parse(nvcc_output(source, arch, "ptx").read_text())
    names = list(module.kernels)
    answer = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    plain = [plain_name(line) for line in answer.stdout.splitlines()]
    return {name: module.kernels[mangled] for name, mangled in zip(plain, names, strict=True)}


def execute_ptx_of(source: Path, arch: str = "sm_80"):
    """An executor of this file's kernels."""
    written: dict[tuple[int, int], np.ndarray] = {}  # by a buffer's bounds, what the previous launch left defined

    def execute(launch: Launch) -> None:
        kernel = _kernels(source, arch)[launch.kernel]
        memory, undefined = _memory(launch, written)
        ptx_interpreter.run(
            kernel, launch.parameters,
            grid=launch.grid, threads=launch.block, shared_bytes=launch.shared_bytes, memory=memory,
        )  # fmt: skip
        written.clear()
        written.update({bounds: memory.defined(name) for bounds, name in undefined.items()})

    return execute


def _memory(launch: Launch, written: dict) -> tuple[ptx_interpreter.Memory, dict[tuple[int, int], str]]:
    """The launch's buffers, and the names of those not all defined, by their bounds.

    Views that overlap, as chunks of one tensor do, become one buffer.
    """
    merged: list[tuple[int, int, str, bool]] = []
    for begin, end, name, undefined in sorted(launch.buffers):
        if merged and begin < merged[-1][1]:
            first, last, names, _ = merged.pop()
            merged.append((first, max(last, end), f"{names}, {name}", False))
        else:
            merged.append((begin, end, name, undefined))
    memory, partly = ptx_interpreter.Memory(), {}
    for index, (begin, end, name, undefined) in enumerate(merged):
        array = np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin))
        memory.add(f"{name} #{index}", array, defined=written.get((begin, end), False) if undefined else True)
        if undefined:
            partly[begin, end] = f"{name} #{index}"
    return memory, partly
