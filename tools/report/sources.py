"""Collects the rows of all compiled kernels from their sources.

A source is a module with these functions: `binaries` gives a record per launch of a problem on a target; `unit` names
what problems share when they are compiled; `release` is that of its `COMPILER`; `unavailable_reason` says what is
missing. To add the kernels of another compiler, add a source.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context

import torch

from var_kernels.triton.problems import PROBLEMS, Problem

from . import cuda_source, triton_source
from .rows import Failure, Row, read

SOURCES = {"triton": triton_source, "cuda": cuda_source}

_read_code = functools.cache(read)


def rows(problem: Problem, target: str, backend: str) -> list[Row | Failure]:
    """The kernels of a problem on a target, in the order of their launches. Launches of the same code share a row."""
    found: dict[tuple, Row] = {}
    try:
        for binary in SOURCES[backend].binaries(problem, target):
            # Problems share code, so the cache reads each code once, without the fields of the problem.
            row = _read_code(replace(binary, op="", problem="", programs=0))
            same = (binary.kernel, binary.code, binary.threads, binary.shared_memory)
            before = found.get(same)
            found[same] = replace(
                row,
                op=problem.op,
                problem=problem.name,
                programs=max(binary.programs, before.programs if before else 0),
                launches=1 + (before.launches if before else 0),
            )
    except Exception as error:  # a compiler may raise anything; the other problems are still reported
        return [Failure(problem.op, problem.name, backend, target, _root(error))]
    return list(found.values())


def _root(error: BaseException) -> str:
    """The innermost cause on one line. Triton wraps an error once for each function that it was compiling."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _part(backend: str, members: list[tuple[tuple[str, str], str]]) -> list[Row | Failure]:
    torch.set_num_threads(1)
    problems = {problem.key: problem for problem in PROBLEMS}
    return [row for key, target in members for row in rows(problems[key], target, backend)]


def collect(
    problems: Sequence[Problem],
    targets: Sequence[str],
    backends: Sequence[str],
    jobs: int,
    progress: Callable[[int, int], None],
) -> list[Row | Failure]:
    """The rows of all problems by all backends, each on those of `targets` that it has. `jobs` processes compile.

    The rows are sorted by problem, backend and target, in the order of the arguments. `progress` is called with the
    number of parts that are done, and of all parts. A part is the problems that share a `unit`, which is compiled once.
    """
    parts: dict[tuple, list[tuple[tuple[str, str], str]]] = {}
    for backend, problem, target in itertools.product(backends, problems, targets):
        unit = SOURCES[backend].unit(problem, target) if target in problem.targets else None
        if unit is not None:
            parts.setdefault((backend, unit), []).append((problem.key, target))
    if not parts:
        return []
    # The long parts first: a long part at the end would leave the other processes idle.
    order = sorted(parts, key=lambda part: -len(parts[part]))
    results: list[Row | Failure] = []
    with ProcessPoolExecutor(min(jobs, len(parts)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_part, part[0], parts[part]) for part in order]
        for done, future in enumerate(as_completed(futures), start=1):
            results.extend(future.result())
            progress(done, len(parts))
    place = {problem.key: i for i, problem in enumerate(problems)}
    return sorted(
        results, key=lambda row: (place[row.op, row.problem], backends.index(row.backend), targets.index(row.target))
    )
