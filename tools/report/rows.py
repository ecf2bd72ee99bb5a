"""A compiled kernel as a problem launches it, and the facts that are read from its machine code."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from var_kernels.triton.targets import TARGETS

from . import amdgcn, flow, occupancy, sass
from .bounds import Loop, loop_bound


@dataclass(frozen=True)
class Binary:
    """A compiled kernel as one problem launches it on a target.

    `code` is a cubin, or the assembly of an AMD GPU. `shared_memory` is the dynamic shared memory in bytes. `columns`
    are columns of tensor memory (sm_100). `has_16bit_products` says whether its source is known to multiply 16-bit
    matrices.
    """

    op: str
    problem: str
    backend: str
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
    """What the report knows about one kernel of a problem on a target.

    `registers` are those of a thread (AMD: vector registers, including accumulation registers). `spills` is the number
    of instructions that access local memory (AMD: of registers spilled to scratch). `stack` is the local memory of a
    thread in bytes (AMD: scratch). `counts` has the number of instructions by kind. `launches` is the number of
    launches of the same code in the problem.
    """

    op: str
    problem: str
    backend: str
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
    def key(self) -> tuple[str, str, str, str, str]:
        """The key of this row in the budgets."""
        return self.op, self.problem, self.backend, self.kernel, self.target

    @property
    def tensor(self) -> dict[str, int]:
        """The number of tensor-core instructions by kind."""
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
    backend: str
    target: str
    message: str

    def __str__(self) -> str:
        return f"{self.op}, {self.problem}, {self.backend} on {self.target}: does not compile: {self.message}"


def tools() -> tuple[str, str]:
    """The paths of NVIDIA's nvdisasm and cuobjdump, which come with Triton. RuntimeError if one is missing."""
    from triton import knobs

    paths = knobs.nvidia.nvdisasm.path, knobs.nvidia.cuobjdump.path
    for name, path in zip(("nvdisasm", "cuobjdump"), paths, strict=True):
        if not Path(path).is_file():
            variable = f"TRITON_{name.upper()}_PATH"
            raise RuntimeError(f"{name}: expected Triton's at {path}, got no file; {variable} names another")
    return paths


@functools.lru_cache(maxsize=4)  # a cubin of nvcc has tens of kernels, and is read once for all of them
def functions(cubin: bytes) -> dict[str, sass.Function]:
    """The kernels of a cubin by name. RuntimeError with the message of the tool that fails."""
    return sass.read(cubin, *tools())


def read(binary: Binary) -> Row:
    """Reads the machine code. RuntimeError or ValueError if that fails."""
    if TARGETS[binary.target].api == "cuda":
        function = functions(binary.code)[binary.symbol]
        module, vector = sass, {"registers": function.registers, "accumulators": 0, "scalars": 0}
    else:
        function = amdgcn.parse(binary.code, binary.symbol)
        module = amdgcn
        vector = {"registers": function.vgprs, "accumulators": function.agprs, "scalars": function.sgprs}
    counts = module.counts(instruction.opcode for instruction in function.instructions)
    shared = function.shared_memory + binary.shared_memory
    is_cuda = module is sass
    return Row(
        op=binary.op, problem=binary.problem, backend=binary.backend, kernel=binary.kernel, target=binary.target,
        config=binary.config, programs=binary.programs, threads=binary.threads, launches=1,
        spills=counts["spills"] if is_cuda else function.vgpr_spills,
        stack=function.stack if is_cuda else function.scratch,
        shared_memory=shared,
        has_16bit_products=binary.has_16bit_products,
        occupancy=_occupancy(binary, function, shared),
        counts=dict(counts),
        loop=loop_of(binary.target, module, function),
        **vector,
    )  # fmt: skip


def _occupancy(binary: Binary, function, shared: int) -> occupancy.Occupancy:
    common = {"threads": binary.threads, "shared_memory": shared}
    if isinstance(function, sass.Function):
        return occupancy.nvidia(
            binary.target, registers=function.registers, tensor_columns=binary.columns, **common
        )
    return occupancy.amd(binary.target, vgprs=function.vgprs, sgprs=function.sgprs, **common)


def loop_of(target: str, module, function) -> Loop | None:
    """The main loop of a function that `module` (`sass` or `amdgcn`) read; None if it has no loop."""

    def products(opcodes: list[str]) -> list[str]:
        return [opcode for opcode in opcodes if any(name.startswith("tensor") for name in module.counts([opcode]))]

    def weight(opcodes: list[str]) -> int:
        # An instruction whose text does not say its FLOP counts as one. A kernel that has such has no other kind.
        return sum(1 if (work := module.tensor_work(opcode)) is None else work[1] for opcode in products(opcodes))

    body = flow.main_loop(function.instructions, weight)
    if body is None:
        return None
    return loop_bound(target, module.counts(body), map(module.tensor_work, products(body)))
