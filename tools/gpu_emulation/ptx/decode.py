"""Turns text into kernels that can run. Every instruction is bound once to a small machine, which finds unsupported
instructions. A data-flow analysis finds the reads of registers that need a check at run time."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

from . import access, conversion, floating, integer, selection, warp  # noqa: F401 - they register their instructions
from .binding import Binder
from .errors import PtxError
from .machine import Machine
from .syntax import Instruction, Kernel, Register, kernels_of

CONTROL = ("bra", "ret", "exit", "bar", "barrier", "trap")


@dataclass(frozen=True)
class Module:
    kernels: dict[str, Kernel]


@functools.lru_cache(maxsize=16)
def parse(text: str) -> Module:
    """Parses and decodes all kernels (`.entry`) of a PTX text.

    Raises PtxError, with the text of the instruction, if something is not supported.
    """
    kernels = kernels_of(text)
    for kernel in kernels:
        _decode(kernel)
    return Module({kernel.name: kernel for kernel in kernels})


def is_control(instruction: Instruction) -> bool:
    """Whether the scheduler executes the instruction, instead of a function on lanes."""
    return instruction.opcode[0] in CONTROL and instruction.opcode[1:2] != ("warp",)


def _decode(kernel: Kernel) -> None:
    machine = Machine(kernel, 1, (32, 1, 1), 0)
    for ins in kernel.instructions:
        binder = Binder(ins, machine)
        if is_control(ins):
            _check_control(binder)
        else:
            binder.bind()
        kernel.granule = min(kernel.granule, binder.shared_width)
        reads = binder.reads | ({ins.predicate} if ins.predicate else set())
        ins.reads, ins.writes = frozenset(reads), frozenset(binder.writes)
    _find_unproven(kernel)


def _check_control(b: Binder) -> None:
    opcode, operands = b.instruction.opcode, b.instruction.operands
    if b.name == "bra":
        supported = opcode[1:] in ((), ("uni",))
    elif b.name in ("bar", "barrier"):
        names = [part for part in opcode[1:] if part not in ("cta", "aligned")]
        numbers = all(isinstance(item, str) and item.isdigit() for item in operands)
        supported = names == ["sync"] and numbers and 1 <= len(operands) <= 2
    else:
        supported = opcode[1:] in ((), ("uni",)) and not operands
    if not supported:
        raise b.error("unsupported form of the instruction")


def _find_unproven(kernel: Kernel) -> None:
    """Definite assignment: a read is proven if every path from the entry to it has written the register."""
    code = kernel.instructions
    bit: dict[Register, int] = {}
    for ins in code:
        for register in (*ins.reads, *ins.writes):
            bit.setdefault(register, 1 << len(bit))

    def mask(registers) -> int:
        return functools.reduce(operator.or_, (bit[register] for register in registers), 0)

    writes = [0 if ins.predicate else mask(ins.writes) for ins in code]
    everything = (1 << len(bit)) - 1
    before = [everything] * (len(code) + 1)
    work, seen = [0], {0}
    before[0] = 0
    while work:
        at = work.pop()
        known = before[at] | writes[at]
        for successor in _successors(code[at], at):
            merged = before[successor] & known
            if successor < len(code) and (successor not in seen or merged != before[successor]):
                before[successor] = merged
                seen.add(successor)
                work.append(successor)
    tracked: set[Register] = set()
    for at, ins in enumerate(code):
        if at in seen:
            ins.unproven = tuple(register for register in ins.reads if not before[at] & bit[register])
            tracked.update(ins.unproven)
    kernel.tracked = tuple(tracked)


def _successors(ins: Instruction, at: int) -> list[int]:
    falls_through = ins.predicate is not None or ins.opcode[0] not in ("bra", "ret", "exit", "trap")
    return ([at + 1] if falls_through else []) + ([ins.target] if ins.target is not None else [])


def barrier_operands(ins: Instruction) -> tuple[int, int | None]:
    """The number of the barrier, and the count of threads that it waits for, if given."""
    number, *count = (int(item) for item in ins.operands)
    if count and (count[0] % 32 or not count[0]):
        raise PtxError(f"a barrier's count of threads must be a multiple of 32: {ins.text}")
    return number, count[0] if count else None
