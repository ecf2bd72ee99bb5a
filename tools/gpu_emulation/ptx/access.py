"""Loads, stores, asynchronous copies and atomics, in every state space."""

from __future__ import annotations

import numpy as np

from . import numerics
from .binding import DTYPES, FLOATS, INTEGERS, UNTYPED, Binder, Execute, bits_of, instruction
from .errors import Fault
from .machine import LOCAL_WINDOW, SHARED_WINDOW, Machine, lanes_of, translated
from .memory import UNITS
from .syntax import Address, Register

_TYPES = (*INTEGERS, *UNTYPED, "f32", "f64", "b8", "u8", "s8")
# These modifiers concern caches and the order between threads. They do not change the result of a lock-step execution.
_HINTS = {"nc", "volatile", "weak", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "ca", "cg", "cs"}
_HINTS |= {"lu", "cv", "wb", "wt", "L2::cache_hint", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"}
_HINTS |= {f"{level}::evict_{when}" for level in ("L1", "L2") for when in ("normal", "unchanged", "first", "last")}
_SPACES = {"global": "global", "const": "global", "shared": "shared", "shared::cta": "shared", "local": "local"}


def _hints(b: Binder) -> bool:
    """Drops the hints. Returns whether the last operand is a cache policy."""
    policy = "L2::cache_hint" in b.modifiers
    b.modifiers = [name for name in b.modifiers if name not in _HINTS]
    return policy


def _space(b: Binder) -> str:
    """The state space: global, shared, local or param, or generic if the instruction names none."""
    return _SPACES.get(name := b.one_of((*_SPACES, "param"), "generic"), name)


class _Space:
    """Reads and writes elements of `width` bytes of one state space, for lanes and addresses."""

    def __init__(self, machine: Machine, space: str, width: int):
        self.machine, self.space, self.width = machine, space, width

    def read(self, address: np.ndarray, lanes) -> np.ndarray:
        if self.space == "global":
            return self.machine.target_memory.read(address, self.width)
        if self.space == "shared":
            return self.machine.shared.read(address, lanes, self.width)
        if self.space == "local":
            return self._local(address, lanes, None)
        values = np.empty(address.size, UNITS[self.width])
        for space, chosen, shifted, some in self._windows(address, lanes):
            values[chosen] = translated(chosen, space.read, shifted, some)
        return values

    def write(self, address: np.ndarray, lanes, values: np.ndarray) -> None:
        if self.space == "global":
            self.machine.target_memory.write(address, self.width, values)
        elif self.space == "shared":
            self.machine.shared.write(address, lanes, self.width, values)
        elif self.space == "local":
            self._local(address, lanes, values)
        else:
            for space, chosen, shifted, some in self._windows(address, lanes):
                translated(chosen, space.write, shifted, some, values[chosen])

    def _windows(self, address: np.ndarray, lanes):
        """Splits a generic access by the state space of each address."""
        lanes = np.arange(self.machine.lanes)[lanes]
        shared, local = address >= SHARED_WINDOW, (address >= LOCAL_WINDOW) & (address < SHARED_WINDOW)
        for name, chosen, start in (
            ("global", ~shared & ~local, 0),
            ("shared", shared, SHARED_WINDOW),
            ("local", local, LOCAL_WINDOW),
        ):
            if chosen.any():
                numbers = np.flatnonzero(chosen)
                yield _Space(self.machine, name, self.width), numbers, address[numbers] - start, lanes[numbers]

    def _local(self, address: np.ndarray, lanes, values: np.ndarray | None):
        machine, width = self.machine, self.width
        wrong = (address < 0) | (address + width > machine.kernel.local_bytes) | (address % width != 0)
        if wrong.any():
            position = int(np.flatnonzero(wrong)[0])
            size = machine.kernel.local_bytes
            raise Fault(f"local access of {width} bytes at {int(address[position])} of {size}", position)
        first = np.arange(machine.lanes)[lanes] * machine.local_stride + address
        place = first[:, None] + np.arange(width)
        if values is None:
            if not machine.local_defined[place].all():
                position = int(np.flatnonzero(~machine.local_defined[place].all(1))[0])
                raise Fault(f"read of uninitialised local memory at {int(address[position])}", position)
            return machine.local[place].view(UNITS[width])[:, 0]
        machine.local[place] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
        machine.local_defined[place] = True
        return None


def _open(b: Binder, space: str, width: int) -> _Space:
    if space in ("shared", "generic"):
        b.shared_width = min(b.shared_width, width)
    return _Space(b.machine, space, width)


def _vector_length(b: Binder) -> int:
    return int(b.one_of(("v2", "v4"), "v1")[1])


@instruction("ld", "ldu")
def _ld(b: Binder) -> Execute:
    kind = b.type(*_TYPES)
    space = _space(b)
    if space == "param":
        return _ld_param(b, kind)
    count, policy = _vector_length(b), _hints(b)
    width = bits_of(kind) // 8
    source, address = _open(b, space, width * count), b.address(1, space)
    dests = [(b.wide_result(item, kind), i) for i, item in enumerate(b.vector(0, count)) if item != "_"]
    if policy:
        b.source(2, "b64")
    dtype = DTYPES[kind]

    def execute(mask):
        lanes = lanes_of(mask)
        values = translated(lanes, source.read, address(lanes), lanes)
        parts = values.view(dtype).reshape(-1, count)
        for dest, i in dests:
            dest[lanes] = parts[:, i]

    return execute


def _ld_param(b: Binder, kind: str) -> Execute:
    operand = b.operand(1)
    if isinstance(operand, Address) and isinstance(operand.base, Register):
        return _ld_indexed_param(b, kind)
    if not isinstance(operand, Address) or operand.base not in b.machine.parameters:
        raise b.error("unsupported access to a parameter")
    stored, count, width = b.machine.parameters[operand.base], _vector_length(b), bits_of(kind) // 8
    end = operand.offset + count * width
    if operand.offset < 0 or operand.offset % width or end > stored.size:
        raise b.error(f"access to bytes {operand.offset} to {end} of a parameter of {stored.size} bytes")
    words = stored[operand.offset : end].view(DTYPES[kind])
    dests = [(b.wide_result(item, kind), i) for i, item in enumerate(b.vector(0, count)) if item != "_"]

    def execute(mask):
        for dest, i in dests:
            np.copyto(dest, words[i : i + 1], where=mask)

    return execute


def _ld_indexed_param(b: Binder, kind: str) -> Execute:
    """Loads from an address in a register: an element of an array in a structure that is passed by value."""
    count, width, space = _vector_length(b), bits_of(kind) // 8, b.machine.parameter_space
    address = b.address(1, "param")
    dests = [(b.wide_result(item, kind), i) for i, item in enumerate(b.vector(0, count)) if item != "_"]

    def execute(mask):
        lanes = lanes_of(mask)
        places = address(lanes)
        wrong = (places < 0) | (places + count * width > space.size) | (places % (count * width) != 0)
        if wrong.any():
            place = int(places[wrong][0])
            raise b.error(f"access to byte {place} of parameters of {space.size} bytes, {count * width} at once")
        for dest, i in dests:
            dest[lanes] = space.view(DTYPES[kind])[places // width + i]

    return execute


@instruction("st")
def _st(b: Binder) -> Execute:
    kind = b.type(*_TYPES)
    space = _space(b)
    count, policy = _vector_length(b), _hints(b)
    width = bits_of(kind) // 8
    target, address = _open(b, space, width * count), b.address(0, space)
    if space == "param":
        raise b.error("unsupported: a store to a parameter")
    sources = [b.value(item, kind, narrow=True) for item in b.vector(1, count)]
    if policy:
        b.source(2, "b64")
    unit, word = UNITS[width * count], UNITS[width]

    def execute(mask):
        lanes = lanes_of(mask)
        places = address(lanes)
        if count == 1:
            values = np.ascontiguousarray(sources[0][lanes]).view(word)
        else:
            packed = np.empty((places.size, count), word)
            for i, source in enumerate(sources):
                packed[:, i] = source[lanes].view(word) if source.strides != (0,) else source[:1].view(word)
            values = packed.view(unit)[:, 0]
        translated(lanes, target.write, places, lanes, values)

    return execute


@instruction("cp")
def _cp(b: Binder) -> Execute:
    b.one_of(("async",))
    shared = b.machine.shared
    if b.flag("commit_group"):
        return shared.commit
    if b.flag("wait_all"):
        return lambda mask: shared.wait(mask, None)
    if b.flag("wait_group"):
        allowed = int(b.source(0, "u32")[0])
        return lambda mask: shared.wait(mask, allowed)
    level = b.one_of(("ca", "cg"))
    b.one_of(("shared", "shared::cta"))
    b.one_of(("global",))
    policy = _hints(b)
    width = int(b.source(2, "u32")[0])
    if width not in ((16,) if level == "cg" else (4, 8, 16)):
        raise b.error(f"cp.async.{level} cannot copy {width} bytes")
    b.shared_width = min(b.shared_width, width)
    to, source = b.address(0, "shared"), b.address(1, "global")
    size = b.source(3, "u32") if b.count - policy > 3 else None
    if policy:
        b.source(b.count - 1, "b64")
    return _async_copy(b, width, to, source, size)


def _async_copy(b: Binder, width: int, to, source, size) -> Execute:
    machine = b.machine

    def fetch(lanes) -> np.ndarray:
        """`size` bytes of each source, and zeros after them. A size of zero touches no memory."""
        address = source(lanes)
        if size is None:
            return translated(lanes, machine.target_memory.read, address, width)
        count = size[lanes]
        data = np.zeros(count.size, UNITS[width])
        whole = np.flatnonzero(count == width)
        numbers = np.arange(machine.lanes)[lanes]
        if whole.size:
            data[whole] = translated(numbers[whole], machine.target_memory.read, address[whole], width)
        for i in np.flatnonzero((count != width) & (count != 0)):
            if count[i] > width:
                raise Fault(f"cp.async of {count[i]} bytes into {width}", int(numbers[i]))
            bytes_ = data[i : i + 1].view(np.uint8)
            start = np.arange(int(count[i]), dtype=np.int64) + address[i]
            bytes_[: count[i]] = translated(np.full(start.size, numbers[i]), machine.target_memory.read, start, 1)
        return data

    def execute(mask):
        lanes = lanes_of(mask)
        data = fetch(lanes)
        translated(lanes, machine.shared.copy, to(lanes), lanes, width, data)

    return execute


@instruction("atom", "red")
def _atom(b: Binder) -> Execute:
    kind = b.type("b16", "b32", "b64", "u32", "s32", "u64", "s64", "f32", "f64", *FLOATS)
    space = _space(b)
    if space == "local":
        raise b.error("unsupported: atomics on local memory")
    _hints(b)
    name = b.one_of(("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"))
    b.flag("noftz")
    first = 1 if b.name == "atom" else 0
    address = b.address(first, space)
    width = bits_of(kind) // 8
    place = _open(b, space, width)
    operands = [b.source(first + 1 + i, kind) for i in range(2 if name == "cas" else 1)]
    dest = b.dest(0, kind) if b.name == "atom" else None
    update = _update(b, name, kind)
    dtype, unit = DTYPES[kind], UNITS[width]
    machine = b.machine

    def execute(mask):
        numbers = np.arange(machine.lanes)[lanes_of(mask)]
        places = address(numbers)
        values = [operand[numbers] for operand in operands]

        def step(old, i):
            return np.asarray(update(np.array([old]).view(dtype), *(v[i : i + 1] for v in values))).view(unit)[0]

        if space == "shared":
            old = translated(numbers, machine.shared.atomic, places, numbers, width, step)
        else:
            old = np.empty(numbers.size, unit)
            for i in range(numbers.size):
                one = numbers[i : i + 1]
                old[i] = translated(one, place.read, places[i : i + 1], one)[0]
                translated(one, place.write, places[i : i + 1], one, np.array([step(old[i], i)], unit))
        if dest is not None:
            dest[numbers] = old.view(dtype)

    return execute


def _update(b: Binder, name: str, kind: str):
    """A function that computes the new value of memory, on arrays of one element."""
    if name == "cas":
        return lambda old, expected, new: np.where(old == expected, new, old)
    if name == "exch":
        return lambda old, new: new
    if name == "inc":
        return lambda old, limit: np.where(old >= limit, 0, old + old.dtype.type(1)).astype(old.dtype)
    if name == "dec":
        return lambda old, limit: np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1))
    if kind in ("f16", "bf16", "f16x2", "bf16x2"):
        if name != "add":
            raise b.error(f"unsupported atomic .{name} for .{kind}")

        def add(old, value):
            both = (numerics.load(x, kind).astype(np.float64) for x in (old, value))
            return numerics.store(sum(both), kind).view(DTYPES[kind])

        return add
    functions = {"add": np.add, "min": np.minimum, "max": np.maximum}
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return functions[name]


@instruction("membar", "fence")
def _fence(b: Binder) -> Execute:
    """Does nothing: lock-step execution keeps every order that a fence can require."""
    b.modifiers = [name for name in b.modifiers if name not in ("sc", "acq_rel", "cta", "gl", "gpu", "sys")]
    return lambda mask: None


@instruction("prefetch", "prefetchu")
def _prefetch(b: Binder) -> Execute:
    b.modifiers = [name for name in b.modifiers if name not in ("global", "L1", "L2", "local")]
    b.address(0, "global")
    return lambda mask: None
