"""The Triton kernels. Their launches are recorded in a user's call and compiled by Triton, which contains all
compilers."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator

from var_kernels.triton.launch import Launch, executor
from var_kernels.triton.problems import Problem
from var_kernels.triton.targets import TARGETS, assume

from .rows import Binary

COMPILER = "Triton"


def unavailable_reason() -> str | None:
    """Why there are no kernels to report on here; None if there are."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed (pip install triton)"


def release() -> str:
    """Triton's version."""
    import triton

    return triton.__version__


def unit(problem: Problem, target: str) -> tuple[str, str]:
    """The raw op and the target: problems of one raw op share its specialisations."""
    return problem.raw, target


def record(problem: Problem, target: str) -> list[Launch]:
    """The launches of a user's call on a target. Nothing is run."""
    launches: list[Launch] = []
    with assume(TARGETS[target]), executor(launches.append):
        problem.launch("var_kernels_triton")
    return launches


def binaries(problem: Problem, target: str) -> Iterator[Binary]:
    """One record per launch. Equal specialisations have the same code object."""
    from var_kernels.triton.offline import compile_for

    for launch in record(problem, target):
        compiled = compile_for(launch, TARGETS[target])
        metadata = compiled.metadata
        is_cuda = TARGETS[target].api == "cuda"
        yield Binary(
            op=problem.op,
            problem=problem.name,
            backend="triton",
            kernel=launch.name,
            symbol=metadata.name,
            target=target,
            code=compiled.asm["cubin" if is_cuda else "amdgcn"],
            programs=math.prod(launch.grid),
            threads=metadata.num_warps * TARGETS[target].warp_size,
            shared_memory=metadata.shared,
            columns=getattr(metadata, "tmem_size", 0) or 0,
            has_16bit_products=_has_16bit_products(compiled.asm["ttir"]),
            config=_describe(launch),
        )


def _has_16bit_products(ttir: str) -> bool:
    return re.search(r"= tt\.dot\b[^\n]*: tensor<[\dx]+x(bf16|f16)", ttir) is not None


def _describe(launch: Launch) -> str:
    constants = [parameter.name for parameter in launch.kernel.params if parameter.is_constexpr]
    values = ", ".join(f"{name} {launch.arguments[name]}" for name in constants if name in launch.arguments)
    return f"{values}; {launch.num_warps} warps, {launch.num_stages} stages"
