"""The CUDA C++ kernels. Their launches are those of the entry functions of `csrc/cuda`, their code is that of the real
build.

The entry functions are compiled by g++ and run on CPU tensors in the emulation, which records the launches instead of
running them. So these rows need g++ and nvcc. `unavailable_reason` says what is missing.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tools.gpu_emulation import cuda
from tools.gpu_emulation.cuda import nvcc
from var_kernels.native import build
from var_kernels.triton.problems import Problem
from var_kernels.triton.targets import TARGETS

from .rows import Binary, functions

COMPILER = "nvcc"


@functools.cache
def unavailable_reason() -> str | None:
    """Why these kernels cannot be compiled and read here; None if they can."""
    for needed, found in {
        "nvcc": nvcc.unavailable_reason() is None,
        "addr2line": shutil.which("addr2line") is not None,
        "c++filt": shutil.which("c++filt") is not None,
    }.items():
        if not found:
            return f"{needed} is not installed"
    try:
        build.require_torch(build.find_torch())
    except build.BuildUnavailable as problem:
        return str(problem)
    return cuda.build.unavailable_reason()


def release() -> str:
    """The release of nvcc."""
    return nvcc.release()


@functools.cache
def _sources() -> dict[str, Path]:
    """The file that implements each raw operator."""
    return {
        raw: source
        for source in sorted((build.CSRC / "cuda").glob("*.cu"))
        for raw in re.findall(r'\bm\.impl\("(\w+)"', source.read_text(encoding="utf-8"))
    }


def arch_of(target: str) -> str:
    """The architecture of the code that a GPU executes. Of the architectures in the library, it is the newest one of
    the GPU's generation that is not newer than the GPU."""
    known = {int(arch.rstrip("a")): arch for arch in build.CUDA_ARCHS}
    card = TARGETS[target].arch
    return "sm_" + known[max(arch for arch in known if arch <= card and arch // 10 == card // 10)]


def unit(problem: Problem, target: str) -> tuple[str, str] | None:
    """The compiled file, which several problems on a target share. None if the problem has no CUDA C++ kernels."""
    if problem.raw not in _sources() or TARGETS[target].api != "cuda":
        return None
    return _sources()[problem.raw].stem, arch_of(target)


def binaries(problem: Problem, target: str) -> Iterator[Binary]:
    """One record per launch."""
    source, arch = _sources()[problem.raw], arch_of(target)
    cubin = _read_file(nvcc.output(source, arch, "cubin"))
    emulation = cuda.load("fast", [source])
    launches = emulation.record(lambda: problem.launch(emulation.namespace), TARGETS[target].multiprocessors)
    for launch in launches:
        yield Binary(
            op=problem.op,
            problem=problem.name,
            backend="cuda",
            kernel=f"{source.stem}.{launch.kernel}",
            symbol=_symbols(cubin)[launch.kernel],
            target=target,
            code=cubin,
            programs=math.prod(launch.grid),
            threads=math.prod(launch.block),
            shared_memory=launch.shared_bytes,
            config=f"code for {arch}",
        )


@functools.cache
def _read_file(path: Path) -> bytes:
    return path.read_bytes()


@functools.lru_cache(maxsize=4)
def _symbols(cubin: bytes) -> dict[str, str]:
    """The kernels' mangled names by their plain ones."""
    mangled = list(functions(cubin))
    return dict(zip(nvcc.plain_names(mangled), mangled, strict=True))
