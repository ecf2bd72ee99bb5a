"""Binds the operands of an instruction to the arrays of a machine. This is done once, before anything runs.

An instruction's function in the modules `integer`, `floating`, `conversion`, `access` and `warp` takes a `Binder` and
returns `execute(mask)`, where `mask` is True (all lanes) or a boolean array. A modifier or operand that the function
did not ask the binder for is an error, so nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import PtxError
from .machine import LOCAL_WINDOW, SHARED_WINDOW, Machine
from .syntax import Address, Instruction, Inverted, Register, literal

INTEGERS = tuple(f"{kind}{bits}" for kind in "us" for bits in (16, 32, 64))
UNTYPED = ("b16", "b32", "b64")
DTYPES = {f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)}
DTYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
DTYPES |= {f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}
# numpy has no bfloat16 and no pairs, so their bits are used.
DTYPES |= {"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "pred": np.dtype(bool)}

Execute = Callable[[object], None]
FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
HANDLERS: dict[tuple[str, bool], Callable[[Binder], Execute]] = {}


def instruction(*opcodes: str, floating: bool | None = None):
    """Registers a function that implements instructions, by the first part of their opcode.

    `floating`: it implements them only if their type is (True) or is not (False) a floating-point type.
    """

    def register(function):
        for opcode in opcodes:
            for case in (True, False) if floating is None else (floating,):
                HANDLERS[opcode, case] = function
        return function

    return register


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else 8 * DTYPES[kind].itemsize


class Binder:
    def __init__(self, instruction: Instruction, machine: Machine):
        self.machine, self.instruction = machine, instruction
        self.name = instruction.opcode[0]
        self.modifiers = list(instruction.opcode[1:])
        self.count = len(instruction.operands)
        self.reads: set[Register] = set()
        self.writes: set[Register] = set()
        self.shared_width = 16
        self._used: set[int] = set()

    def bind(self) -> Execute:
        key = self.name, bool(self.modifiers) and self.modifiers[-1] in FLOATS
        if key not in HANDLERS:
            raise self.error("unsupported instruction")
        execute = HANDLERS[key](self)
        if self.modifiers:
            raise self.error(f"unsupported modifier .{self.modifiers[0]}")
        if self._used != set(range(self.count)):
            raise self.error(f"expected {len(self._used)} operands, got {self.count}")
        return execute

    def error(self, message: str) -> PtxError:
        kernel = self.machine.kernel.name
        return PtxError(f"{message}\n  kernel {kernel}, instruction: {self.instruction.text}")

    # ---- Modifiers

    def flag(self, *names: str) -> bool:
        """Whether the instruction has one of the modifiers."""
        for name in names:
            if name in self.modifiers:
                self.modifiers.remove(name)
                return True
        return False

    def one_of(self, names, default: str | None = None) -> str:
        found = [name for name in self.modifiers if name in names]
        if found:
            self.modifiers.remove(found[0])
            return found[0]
        if default is None:
            raise self.error(f"expected one of the modifiers {', '.join('.' + name for name in names)}")
        return default

    def type(self, *allowed: str) -> str:
        """The last modifier, which is the type."""
        if not self.modifiers or self.modifiers[-1] not in allowed:
            raise self.error(f"unsupported type .{self.modifiers[-1] if self.modifiers else ''}")
        return self.modifiers.pop()

    # ---- Operands

    def operand(self, index: int):
        if index >= self.count:
            raise self.error(f"expected at least {index + 1} operands, got {self.count}")
        self._used.add(index)
        return self.instruction.operands[index]

    def source(self, index: int, kind: str) -> np.ndarray:
        """The operand as an array over the lanes, of exactly the width of the type."""
        return self.value(self.operand(index), kind)

    def value(self, operand, kind: str, narrow: bool = False) -> np.ndarray:
        """The value of an operand. `narrow`: a register may be wider than the type, and its low bits are used."""
        dtype, lanes = DTYPES[kind], self.machine.lanes
        if isinstance(operand, Inverted):
            raise self.error("a negated predicate is not supported here")
        if isinstance(operand, Register):
            self.reads.add(operand)
            return self._view(self.machine.register(operand), operand.width, kind, narrow)
        if not isinstance(operand, str):
            raise self.error(f"expected a register or a constant, got {operand!r}")
        if operand in self.machine.special:
            return self._view(self.machine.special[operand], 32, kind, narrow)
        if operand == "WARP_SZ":
            operand = "32"
        bits = literal(operand, kind)
        if bits is None:
            bits = self._symbol(operand) & ((1 << bits_of(kind)) - 1)
        if kind == "pred":
            return np.broadcast_to(np.bool_(bits), (lanes,))
        word = np.array([bits], DTYPES[f"u{bits_of(kind)}"]).view(dtype)
        return np.broadcast_to(word, (lanes,))

    def _view(self, array: np.ndarray, width: int, kind: str, narrow: bool) -> np.ndarray:
        bits, dtype = bits_of(kind), DTYPES[kind]
        if width == bits:
            return array if kind == "pred" else array.view(dtype)
        if not narrow or width < bits or width == 1:
            raise self.error(f"a register of {width} bits cannot be read as .{kind}")
        return array.view(dtype)[:: width // bits]

    def _symbol(self, name: str) -> int:
        """The address of a variable in its own state space."""
        machine, kernel = self.machine, self.machine.kernel
        if name in kernel.static_shared:
            return kernel.static_shared[name]
        if name in kernel.local:
            return kernel.local[name]
        if name in machine.constants:
            return machine.constants[name]
        if name in machine.parameter_addresses:
            return machine.parameter_addresses[name]
        variable = kernel.variables.get(name)
        if variable is not None and variable.space == "shared" and variable.external:
            return machine.dynamic_shared
        raise self.error(f"unknown operand {name}")

    def predicate(self, index: int) -> Callable[[], np.ndarray]:
        """A function that gives the value of a predicate operand, which may be negated."""
        operand = self.operand(index)
        if isinstance(operand, Inverted):
            array = self.value(operand.register, "pred")
            return lambda: ~array
        array = self.value(operand, "pred")
        return lambda: array

    def dest(self, index: int, kind: str) -> np.ndarray:
        return self.result(self.operand(index), kind)

    def result(self, operand, kind: str) -> np.ndarray:
        """The array to write to. The operand `_` discards the value."""
        if operand == "_":
            return self.machine.scratch(DTYPES[kind], 9)
        if not isinstance(operand, Register) or operand.width != bits_of(kind):
            raise self.error(f"expected a register of {bits_of(kind)} bits for .{kind}, got {operand}")
        self.writes.add(operand)
        array = self.machine.register(operand)
        return array if kind == "pred" else array.view(DTYPES[kind])

    def wide_result(self, operand, kind: str) -> np.ndarray:
        """As `result`, but the register may be wider than the type. Assignments then extend with the sign or with
        zeros."""
        if operand == "_" or not isinstance(operand, Register) or operand.width == bits_of(kind):
            return self.result(operand, kind)
        if operand.width < bits_of(kind) or kind[0] not in "bus":
            raise self.error(f"{operand.name} has {operand.width} bits, too few for .{kind}")
        self.writes.add(operand)
        return self.machine.register(operand).view(DTYPES[f"{kind[0]}{operand.width}"])

    def vector(self, index: int, count: int) -> tuple:
        """The elements of `{a, b, ...}`. A single operand counts as a vector of one element."""
        operand = self.operand(index)
        elements = operand if isinstance(operand, tuple) else (operand,)
        if len(elements) != count:
            raise self.error(f"expected a vector of {count} elements, got {len(elements)}")
        return elements

    def address(self, index: int, space: str) -> Callable[[object], np.ndarray]:
        """A function that computes the addresses (n,) int64 of the given lanes, within their state space."""
        operand = self.operand(index)
        if not isinstance(operand, Address):
            raise self.error(f"expected an address, got {operand!r}")
        offset = operand.offset
        if isinstance(operand.base, Register):
            if operand.base.width not in (32, 64):
                raise self.error(f"an address has 32 or 64 bits, not {operand.base.width}")
            # A 32-bit address is unsigned and does not wrap when its offset is added.
            base = self.value(operand.base, "u32" if operand.base.width == 32 else "s64")
            return lambda lanes: base[lanes].astype(np.int64) + offset
        start = self._symbol(operand.base) if operand.base else 0
        if space == "generic":
            kernel = self.machine.kernel
            if operand.base in kernel.local:
                start += LOCAL_WINDOW
            elif operand.base not in self.machine.constants and operand.base:
                start += SHARED_WINDOW
        fixed = np.full(self.machine.lanes, start + offset, np.int64)
        return lambda lanes: fixed[lanes]


def elementwise(b: Binder, function, kind: str, sources: int, result: str | None = None) -> Execute:
    """`dest = function(*sources)` for a numpy ufunc or a function of arrays."""
    dest = b.dest(0, result or kind)
    inputs = [b.source(i + 1, kind) for i in range(sources)]
    return assign(dest, function, inputs)


def assign(dest: np.ndarray, function, inputs: list) -> Execute:
    if isinstance(function, np.ufunc):

        def execute(mask):
            function(*inputs, out=dest, where=mask)

    else:

        def execute(mask):
            np.copyto(dest, function(*inputs), where=mask)

    return execute
