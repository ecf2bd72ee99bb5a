"""Runs a kernel. Blocks run in batches, in lock-step; threads that have diverged form groups of one program counter
each.

The group with the lowest program counter runs first, up to the next control instruction or to the place where another
group waits. Groups that meet are merged. With the way compilers lay out code, groups reconverge at once.
"""

from __future__ import annotations

import collections
import math
import numbers
from dataclasses import dataclass, field

import numpy as np

from .binding import Binder
from .decode import barrier_operands, is_control
from .errors import Fault, PartialWarp, PtxError
from .machine import WARP, Machine
from .memory import Memory
from .syntax import SCALAR_BYTES, Instruction, Kernel, parameter_bytes

BATCH_LANES = 8192  # so that a few registers of a batch fit in the second-level cache
_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}


@dataclass
class Stats:
    """`instructions` is the number of executed instructions; one counts once for a block if any of its threads took
    part. `opcodes` has the same by full opcode."""

    instructions: int = 0
    opcodes: collections.Counter = field(default_factory=collections.Counter)


def run(
    kernel: Kernel,
    arguments,
    *,
    grid: tuple[int, int, int],
    threads: tuple[int, int, int],
    shared_bytes: int = 0,
    memory: Memory,
    limit: int = 5_000_000,
) -> Stats:
    """Executes `kernel` for the whole grid.

    `arguments`: ints (pointers as addresses), floats, and bytes for structures passed by value, in the order of
    `kernel.parameters`. `shared_bytes`: dynamic shared memory in bytes. `limit`: how many instructions a batch of
    blocks may execute, which ends an endless loop. Raises PtxError, which names kernel, instruction, block and thread,
    if a rule of the PTX machine is broken.
    """
    parameters = _encode_arguments(kernel, list(arguments))
    grid, threads = _triple("grid", grid), _triple("threads", threads)
    _check_launch(kernel, threads)
    blocks = math.prod(grid)
    per_batch = max(1, min(BATCH_LANES // (-(-math.prod(threads) // WARP) * WARP), blocks))
    batches = -(-blocks // per_batch)
    size = -(-blocks // batches)
    hits = np.zeros(len(kernel.instructions) + 1, np.int64)
    program = None
    with np.errstate(all="ignore"):
        for first in range(0, blocks, size):
            count = min(size, blocks - first)
            if program is None or program.machine.blocks != count:
                program = _Program(kernel, Machine(kernel, count, threads, shared_bytes))
            program.machine.start(memory, parameters, grid, first)
            _Schedule(program, hits, limit).run()
    return _stats(kernel, hits)


def _stats(kernel: Kernel, hits: np.ndarray) -> Stats:
    stats = Stats()
    for ins, count in zip(kernel.instructions, np.cumsum(hits).tolist(), strict=False):
        if count:
            stats.opcodes[".".join(ins.opcode)] += count
            stats.instructions += count
    return stats


def _triple(name: str, value) -> tuple[int, int, int]:
    value = tuple(int(n) for n in value)
    if len(value) != 3 or min(value) < 1:
        raise ValueError(f"{name}: expected three positive numbers, got {value}")
    return value


def _check_launch(kernel: Kernel, threads: tuple[int, int, int]) -> None:
    count = math.prod(threads)
    required = kernel.required_threads
    if required is not None and math.prod(required) != count:
        raise PtxError(f"kernel {kernel.name} requires {math.prod(required)} threads, launched with {count}")
    limit = min(kernel.max_threads or 1024, 1024)
    if count > limit:
        raise PtxError(f"kernel {kernel.name} allows {limit} threads, launched with {count}")


def _encode_arguments(kernel: Kernel, arguments: list) -> list[bytes]:
    if len(arguments) != len(kernel.parameters):
        names = ", ".join(f"{name}: {kind}" for name, kind in kernel.parameters)
        raise PtxError(f"kernel {kernel.name} takes {len(kernel.parameters)} arguments ({names}), got {len(arguments)}")
    words = []
    for (name, kind), value in zip(kernel.parameters, arguments, strict=True):
        size = parameter_bytes(kind)
        if kind in _FLOATS and isinstance(value, numbers.Real):
            words.append(_FLOATS[kind](value).tobytes())
        elif kind in SCALAR_BYTES and kind not in _FLOATS and isinstance(value, numbers.Integral):
            words.append((int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little"))
        elif isinstance(value, bytes) and len(value) == size:
            words.append(value)
        else:
            raise PtxError(f"parameter {name} of kernel {kernel.name} is .{kind}, got {value!r}")
    return words


class _Program:
    """The instructions of a kernel, bound to one machine."""

    def __init__(self, kernel: Kernel, machine: Machine):
        self.kernel, self.machine = kernel, machine
        code = kernel.instructions
        self.execute = [None if is_control(ins) else self._bind(ins) for ins in code]
        # For each instruction, the next one that the scheduler has to handle.
        self.next_control = [len(code)] * (len(code) + 1)
        for at in range(len(code) - 1, -1, -1):
            self.next_control[at] = at if self.execute[at] is None else self.next_control[at + 1]

    def _bind(self, ins: Instruction):
        execute = Binder(ins, self.machine).bind()
        marks = [self.machine.written[register] for register in ins.writes if register in self.machine.written]
        unproven = [register for register in ins.unproven if register != ins.predicate]
        if marks or unproven:
            execute = self._checked(execute, unproven, marks)
        return execute if ins.predicate is None else self._guarded(execute, ins)

    def _checked(self, execute, unproven, marks):
        def checked(mask):
            self.check_written(unproven, mask)
            execute(mask)
            for written in marks:
                np.copyto(written, True, where=mask)

        return checked

    def check_written(self, registers, mask) -> None:
        for register in registers:
            missing = ~self.machine.written[register]
            if mask is not True:
                missing &= mask
            if missing.any():
                raise Fault(f"read of the uninitialised register {register.name}", int(np.flatnonzero(missing)[0]))

    def _guarded(self, execute, ins: Instruction):
        predicate = self.machine.register(ins.predicate)
        negated, lanes = ins.negated, predicate.size
        unproven = [ins.predicate] if ins.predicate in ins.unproven else []

        def guarded(mask):
            if unproven:
                self.check_written(unproven, mask)
            active = ~predicate if negated else predicate
            active = active if mask is True else active & mask
            count = np.count_nonzero(active)
            if count == lanes:
                execute(True)
            elif count:
                execute(active)

        return guarded


class _Group:
    """Lanes with the same program counter. `mask` is True if they are all lanes of the batch."""

    def __init__(self, pc: int, mask, machine: Machine):
        self.pc, self.suspended = pc, None
        self.mask = True if mask is not True and mask.all() else mask
        self.blocks = machine.blocks
        if self.mask is not True:
            self.blocks = int(np.count_nonzero(mask.reshape(machine.blocks, -1).any(1)))

    def array(self, machine: Machine) -> np.ndarray:
        return np.ones(machine.lanes, bool) if self.mask is True else self.mask


class _Schedule:
    """One batch of blocks, from entry to exit."""

    def __init__(self, program: _Program, hits: np.ndarray, limit: int):
        self.program, self.machine, self.hits = program, program.machine, hits
        self.code, self.left, self.limit = program.kernel.instructions, limit, limit
        everyone = True if self.machine.exists.all() else self.machine.exists.copy()
        self.groups = [_Group(0, everyone, self.machine)]
        self.waiting: list[tuple[int, int, _Group]] = []  # (barrier, threads it waits for, the group that waits)
        self.exited = ~self.machine.exists

    def run(self) -> None:
        while self.groups:
            # Suspended groups wait for other lanes of their warps, so they come last.
            self.groups.sort(key=lambda group: (group.suspended is None, -group.pc))
            group = self.groups.pop()
            others = [other for other in self.groups if other.pc != group.pc]
            if len(others) < len(self.groups):
                masks = [other.array(self.machine) for other in self.groups if other.pc == group.pc]
                group = _Group(group.pc, np.logical_or.reduce([group.array(self.machine), *masks]), self.machine)
                self.groups = others
            elif group.suspended is not None:
                raise self._error(group.suspended, group.pc, group.mask)
            stop = min((other.pc for other in others if other.pc > group.pc), default=len(self.code))
            self._advance(group, stop)
            if not self.groups and self.waiting:
                self._stuck()

    def _advance(self, group: _Group, stop: int) -> None:
        """Runs a group until it meets another one, waits, exits or splits."""
        execute, next_control = self.program.execute, self.program.next_control
        alone = not self.groups
        mask, at = group.mask, group.pc
        while True:
            start, end = at, min(next_control[at], stop)
            try:
                while at < end:
                    execute[at](mask)
                    at += 1
                group.pc = at
                if at == len(self.code):
                    raise PtxError(f"kernel {self.program.kernel.name} runs past its last instruction")
                if at == stop:
                    self._count(group, start, at)
                    self.groups.append(group)
                    return
                following = self._control(group)
                self._count(group, start, at + 1)
            except PartialWarp as fault:
                self._count(group, start, at)
                group.pc, group.suspended = at, fault
                self.groups.append(group)
                return
            except Fault as fault:
                raise self._error(fault, at, mask) from None
            if following is None:
                return
            if not alone or self.groups:
                group.pc = following
                self.groups.append(group)
                return
            at = following

    def _count(self, group: _Group, start: int, end: int) -> None:
        """Records that the group executed the instructions from `start` up to `end`."""
        self.hits[start] += group.blocks
        self.hits[end] -= group.blocks
        self.left -= end - start
        if self.left < 0:
            raise Fault(f"more than {self.limit} instructions: an endless loop?")

    def _control(self, group: _Group) -> int | None:
        """Where the whole group continues, or None if it has been put elsewhere."""
        ins = self.code[group.pc]
        taken = self._taken(group, ins)
        if taken is None:
            return group.pc + 1
        if taken is group.mask:
            return self._transfer(ins, group)
        machine = self.machine
        active = _Group(group.pc, taken, machine)
        rest = _Group(group.pc + 1, group.array(machine) & ~taken, machine)
        if ins.opcode == ("bra", "uni"):
            self._check_uniform(active, rest)
        following = self._transfer(ins, active)  # may fail; the group has not been put anywhere then
        self.groups.append(rest)
        if following is not None:
            active.pc = following
            self.groups.append(active)
        return None

    def _transfer(self, ins: Instruction, group: _Group) -> int | None:
        name = ins.opcode[0]
        if name == "bra":
            return ins.target
        if name == "trap":
            raise Fault("trap", int(np.argmax(group.array(self.machine))))
        if name in ("ret", "exit"):
            self.exited |= group.array(self.machine)
            return None
        return self._arrive(ins, group)

    def _taken(self, group: _Group, ins: Instruction):
        """The lanes that execute a control instruction: None, the group's mask itself, or a part of it."""
        if ins.predicate is None:
            return group.mask
        if ins.unproven:
            self.program.check_written(ins.unproven, group.mask)
        value = self.machine.register(ins.predicate)
        taken = ~value if ins.negated else value.copy()
        if group.mask is not True:
            taken &= group.mask
        count = np.count_nonzero(taken)
        if count == 0:
            return None
        total = taken.size if group.mask is True else np.count_nonzero(group.mask)
        return group.mask if count == total else taken

    def _check_uniform(self, active: _Group, rest: _Group) -> None:
        both = active.mask.reshape(-1, WARP).any(1) & rest.mask.reshape(-1, WARP).any(1)
        if both.any():
            raise Fault("bra.uni goes both ways within a warp", int(np.flatnonzero(both)[0]) * WARP)

    # ---- Barriers

    def _arrive(self, ins: Instruction, group: _Group) -> int | None:
        barrier, count = barrier_operands(ins)
        machine = self.machine
        if ins.opcode[0] == "bar" or "aligned" in ins.opcode:
            absent = np.repeat(group.array(machine).reshape(-1, WARP).any(1), WARP) & ~group.array(machine)
            absent &= machine.exists
            if absent.any():
                lane = int(np.flatnonzero(absent)[0])
                why = "has exited" if self.exited[lane] else "is elsewhere"
                raise PartialWarp(f"{'.'.join(ins.opcode)} by a partial warp: lane {lane % WARP} {why}", lane)
        if count is not None and count > machine.padded:
            raise Fault(f"the barrier waits for {count} threads of {machine.threads}")
        if group.mask is True and count in (None, machine.threads) and not self.waiting:
            machine.shared.barrier(True)
            return group.pc + 1
        group = _Group(group.pc + 1, group.mask, machine)
        self.waiting.append((barrier, count or machine.threads, group))
        self._release()
        return None

    def _release(self) -> None:
        """Releases the blocks in which all threads that a barrier waits for have arrived."""
        machine = self.machine
        for key in {(barrier, count) for barrier, count, _ in self.waiting}:
            arrived = np.zeros(machine.lanes, bool)
            for barrier, count, group in self.waiting:
                if (barrier, count) == key:
                    arrived |= group.array(machine)
            complete = arrived.reshape(machine.blocks, -1).sum(1) >= key[1]
            if not complete.any():
                continue
            released = np.repeat(complete, machine.padded)
            # A barrier of some warps is treated as if it ordered all of them, so races between the other warps may be
            # missed.
            machine.shared.barrier(released)
            remaining = []
            for barrier, count, group in self.waiting:
                if (barrier, count) != key:
                    remaining.append((barrier, count, group))
                    continue
                mask = group.array(machine)
                if (mask & released).any():
                    self.groups.append(_Group(group.pc, mask & released, machine))
                if (mask & ~released).any():
                    remaining.append((barrier, count, _Group(group.pc, mask & ~released, machine)))
            self.waiting = remaining

    def _stuck(self) -> None:
        barrier, count, group = self.waiting[0]
        lane = int(np.flatnonzero(group.array(self.machine))[0])
        block = slice(
            lane // self.machine.padded * self.machine.padded, (lane // self.machine.padded + 1) * self.machine.padded
        )
        gone = int(np.count_nonzero(self.exited[block] & self.machine.exists[block]))
        if gone:
            why = f"{gone} threads of the block have exited"
        else:
            why = "the other threads of the block wait at other barriers"
        fault = Fault(f"barrier {barrier} waits for {count} threads for ever: {why}", lane)
        raise self._error(fault, group.pc - 1, group.mask)

    def _error(self, fault: Fault, at: int, mask) -> PtxError:
        machine = self.machine
        lane = fault.lane
        if lane is None:
            lane = int(np.argmax(mask)) if mask is not True else 0
        block = tuple(int(machine.special[f"%ctaid.{axis}"][lane]) for axis in "xyz")
        thread = tuple(int(machine.special[f"%tid.{axis}"][lane]) for axis in "xyz")
        return PtxError(
            f"{fault.message}\n  kernel {self.program.kernel.name}, block {block}, thread {thread}\n"
            f"  instruction {at}: {self.code[at].text}"
        )
