"""Where compiled kernels come from, and what is read off each of them.

A source yields `Binary` records; :func:`triton_binaries` is the one there is. Kernels of another compiler join the
report by another source: name, machine code, threads and shared memory are all that :func:`read` needs.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from ..triton.launch import Launch, executor
from ..triton.targets import TARGETS, assume
from . import amdgcn, flow, occupancy, sass
from .bounds import Loop, loop_bound
from .problems import PROBLEMS, Problem


@dataclass(frozen=True)
class Binary:
    """A compiled kernel as one problem launches it on a target.

    `code` is a cubin, or the assembly of an AMD GPU; `shared_memory` the dynamic part of it in bytes; `columns` those
    of tensor memory (sm_100); `has_16bit_products` whether its source multiplies 16-bit matrices.
    """

    op: str
    problem: str
    kernel: str  # <stem>.<function>
    symbol: str  # its name in `code`
    target: str
    code: bytes | str = field(repr=False)
    programs: int
    threads: int
    shared_memory: int
    columns: int = 0
    has_16bit_products: bool = False
    config: str = ""


@dataclass(frozen=True)
class Row:
    """What the report knows of one kernel of a problem on a target.

    `registers` are those of a thread (AMD: vector registers, accumulation registers included); `spills` instructions
    that access local memory (AMD: registers spilled to scratch); `stack` bytes of local memory of a thread (AMD:
    scratch); `counts` instructions by kind. `launches` counts the starts of the same code in the problem.
    """

    op: str
    problem: str
    kernel: str
    target: str
    config: str
    programs: int
    threads: int
    launches: int
    registers: int
    accumulators: int
    scalars: int
    spills: int
    stack: int
    shared_memory: int
    has_16bit_products: bool
    occupancy: occupancy.Occupancy
    counts: dict[str, int]
    loop: Loop | None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What budgets are kept for."""
        return self.op, self.problem, self.kernel, self.target

    @property
    def tensor(self) -> dict[str, int]:
        """Tensor-core instructions by kind."""
        return {name.partition(" ")[2]: n for name, n in self.counts.items() if name.startswith("tensor ")}

    def wide_share(self, access: str) -> float | None:
        """The share of "loads", "stores" or "async copies" that move 128 bits; None if there are none."""
        total = self.counts.get(access, 0)
        return self.counts[access + " wide"] / total if total else None


@dataclass(frozen=True)
class Failure:
    """A problem that does not compile for a target."""

    op: str
    problem: str
    target: str
    message: str


def read(binary: Binary, nvdisasm: str, cuobjdump: str) -> Row:
    """Everything that the machine code says. RuntimeError or ValueError if it cannot be read."""
    if TARGETS[binary.target].api == "cuda":
        function = sass.read(binary.code, nvdisasm, cuobjdump)[binary.symbol]
        module, vector = sass, {"registers": function.registers, "accumulators": 0, "scalars": 0}
    else:
        function = amdgcn.parse(binary.code, binary.symbol)
        module = amdgcn
        vector = {"registers": function.vgprs, "accumulators": function.agprs, "scalars": function.sgprs}
    counts = module.counts(instruction.opcode for instruction in function.instructions)
    shared = function.shared_memory + binary.shared_memory
    is_cuda = module is sass
    return Row(
        op=binary.op, problem=binary.problem, kernel=binary.kernel, target=binary.target, config=binary.config,
        programs=binary.programs, threads=binary.threads, launches=1,
        spills=counts["spills"] if is_cuda else function.vgpr_spills,
        stack=function.stack if is_cuda else function.scratch,
        shared_memory=shared,
        has_16bit_products=binary.has_16bit_products,
        occupancy=_occupancy(binary, function, shared),
        counts=dict(counts),
        loop=_loop(binary.target, module, function),
        **vector,
    )  # fmt: skip


def _occupancy(binary: Binary, function, shared: int) -> occupancy.Occupancy:
    common = {"threads": binary.threads, "shared_memory": shared}
    if isinstance(function, sass.Function):
        return occupancy.nvidia(
            binary.target, registers=function.registers, tensor_columns=binary.columns, **common
        )
    return occupancy.amd(binary.target, vgprs=function.vgprs, sgprs=function.sgprs, **common)


def _loop(target: str, module, function) -> Loop | None:
    def weight(opcodes):
        work = [module.tensor_work(opcode) for opcode in opcodes]
        return sum(flop for entry in work if entry is not None for flop in entry[1:])

    body = flow.main_loop(function.instructions, weight)
    if body is None:
        return None
    products = [opcode for opcode in body if any(name.startswith("tensor") for name in module.counts([opcode]))]
    return loop_bound(target, module.counts(body), map(module.tensor_work, products))


# ---- Triton


def record(problem: Problem, target: str) -> list[Launch]:
    """The launches of a user's call on a target; nothing is run."""
    launches: list[Launch] = []
    with assume(TARGETS[target]), executor(launches.append):
        problem.launch()
    return launches


def triton_binaries(problem: Problem, target: str) -> Iterator[Binary]:
    """One record per launch; the code of equal specialisations is the same object."""
    from ..triton.offline import compile_for

    for launch in record(problem, target):
        compiled = compile_for(launch, TARGETS[target])
        metadata = compiled.metadata
        is_cuda = TARGETS[target].api == "cuda"
        yield Binary(
            op=problem.op,
            problem=problem.name,
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


def tools() -> tuple[str, str]:
    """NVIDIA's nvdisasm and cuobjdump, which come with Triton. RuntimeError if one is missing."""
    from triton import knobs

    paths = knobs.nvidia.nvdisasm.path, knobs.nvidia.cuobjdump.path
    for name, path in zip(("nvdisasm", "cuobjdump"), paths, strict=True):
        if not Path(path).is_file():
            variable = f"TRITON_{name.upper()}_PATH"
            raise RuntimeError(f"{name}: expected Triton's at {path}, got no file; {variable} names another")
    return paths


# ---- The whole report


@functools.cache
def _read_code(binary: Binary) -> Row:
    return read(binary, *tools())


def rows(problem: Problem, target: str) -> list[Row | Failure]:
    """The kernels of a problem on a target, in the order of their launch; equal ones in one row."""
    found: dict[tuple, Row] = {}
    try:
        for binary in triton_binaries(problem, target):
            # Problems share code: it is read once, whoever launches it.
            row = _read_code(replace(binary, op="", problem="", programs=0))
            same = (binary.kernel, binary.code)
            before = found.get(same)
            found[same] = replace(
                row,
                op=problem.op,
                problem=problem.name,
                programs=max(binary.programs, before.programs if before else 0),
                launches=1 + (before.launches if before else 0),
            )
    except Exception as error:  # whatever the compiler raises: the other problems are reported all the same
        return [Failure(problem.op, problem.name, target, _root(error))]
    return list(found.values())


def _root(error: BaseException) -> str:
    """The innermost cause on one line: Triton wraps an error once per function that it was compiling."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _group(names: list[tuple[str, str]], target: str) -> list[Row | Failure]:
    torch.set_num_threads(1)
    return [row for problem in PROBLEMS if problem.key in names for row in rows(problem, target)]


def collect(
    problems: Sequence[Problem], targets: Sequence[str], jobs: int, progress: Callable[[int, int], None]
) -> list[Row | Failure]:
    """The rows of all problems on those of `targets` that are theirs, compiled by `jobs` processes.

    They come in the order of the two arguments. `progress` is called with the number of parts done, and of all parts. A
    part is one raw operator on one target, so that what its problems have in common is compiled once.
    """
    parts: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for problem, target in itertools.product(problems, targets):
        if target in problem.targets:
            parts.setdefault((problem.raw, target), []).append(problem.key)
    # The long ones first: a long one at the end would leave the other processes idle.
    order = sorted(parts, key=lambda part: -len(parts[part]))
    results: list[Row | Failure] = []
    with ProcessPoolExecutor(min(jobs, len(parts)), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_group, parts[raw, target], target) for raw, target in order]
        for done, future in enumerate(as_completed(futures), start=1):
            results.extend(future.result())
            progress(done, len(parts))
    place = {problem.key: i for i, problem in enumerate(problems)}
    return sorted(results, key=lambda row: (place[row.op, row.problem], targets.index(row.target)))
