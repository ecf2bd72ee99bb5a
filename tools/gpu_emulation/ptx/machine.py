"""The state of a batch of blocks: registers, special registers, shared and local memory, one lane per thread.

Every register is one numpy array over all lanes of the batch, so that an instruction is a few numpy calls whatever the
number of blocks. Blocks whose threads are no multiple of 32 are padded with lanes that never run.
"""

from __future__ import annotations

import numpy as np

from .errors import Fault, PartialWarp
from .memory import Memory
from .shared_memory import SharedMemory
from .syntax import Kernel, Register, parameter_bytes

WARP = 32
# Generic addresses of shared and local memory: far from every address that a host gives to an array.
SHARED_WINDOW, LOCAL_WINDOW = 1 << 61, 1 << 60
WORDS = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Machine:
    """Storage for `blocks` blocks of `threads` threads of one kernel; reused from batch to batch."""

    def __init__(self, kernel: Kernel, blocks: int, threads: tuple[int, int, int], shared_bytes: int):
        self.kernel, self.blocks = kernel, blocks
        self.threads = int(np.prod(threads))
        self.padded = -(-self.threads // WARP) * WARP
        self.lanes = blocks * self.padded
        self.in_block = np.tile(np.arange(self.padded), blocks)
        self.block = np.repeat(np.arange(blocks), self.padded)
        self.exists = self.in_block < self.threads
        self.registers: dict[Register, np.ndarray] = {}
        self.written = {register: np.zeros(self.lanes, bool) for register in kernel.tracked}
        self.carry = np.zeros(self.lanes, np.uint64)
        self.memory = Memory()
        self.constants: dict[str, int] = {}
        sizes = [parameter_bytes(kind) for _, kind in kernel.parameters]
        starts = np.cumsum([0, *(-(-size // 16) * 16 for size in sizes)]).tolist()
        self.parameter_space = np.zeros(starts[-1], np.uint8)
        self.parameter_addresses = {name: start for (name, _), start in zip(kernel.parameters, starts, strict=False)}
        self.parameters = {
            name: self.parameter_space[start : start + size]
            for (name, start), size in zip(self.parameter_addresses.items(), sizes, strict=True)
        }
        self.special = self._special_registers(threads)
        self.dynamic_shared = -(-kernel.static_shared_bytes // 128) * 128 if shared_bytes else 0
        size = self.dynamic_shared + shared_bytes if shared_bytes else kernel.static_shared_bytes
        warp = self.in_block // WARP
        self.shared = SharedMemory(blocks, size, kernel.granule, warp, self.block)
        stride = -(-max(kernel.local_bytes, 16) // 16) * 16
        self.local_stride = stride
        self.local = np.zeros(self.lanes * stride if kernel.local_bytes else 0, np.uint8)
        self.local_defined = np.zeros(self.local.size, bool)
        self._scratch: dict[tuple, np.ndarray | list[np.ndarray]] = {}
        self._add_variables()

    def _special_registers(self, threads: tuple[int, int, int]) -> dict[str, np.ndarray]:
        lane = np.arange(self.lanes, dtype=np.uint32) % WARP
        x, y, z = threads
        thread = self.in_block.astype(np.uint32)
        one = np.uint32(1)
        special = {
            "%tid.x": thread % x,
            "%tid.y": thread // x % y,
            "%tid.z": thread // (x * y),
            "%laneid": lane,
            "%warpid": thread // WARP,
            "%lanemask_eq": one << lane,
            "%lanemask_lt": (one << lane) - one,
            "%lanemask_le": ((one << lane) - one) | (one << lane),
            "%lanemask_ge": ~((one << lane) - one),
            "%lanemask_gt": ~(((one << lane) - one) | (one << lane)),
        }
        for axis, size in zip("xyz", threads, strict=True):
            special[f"%ntid.{axis}"] = np.full(self.lanes, size, np.uint32)
            special[f"%ctaid.{axis}"] = np.zeros(self.lanes, np.uint32)
            special[f"%nctaid.{axis}"] = np.zeros(self.lanes, np.uint32)
        return special

    def _add_variables(self) -> None:
        """Module variables in .const and .global live in arrays of their own."""
        for variable in self.kernel.variables.values():
            if variable.space in ("const", "global") and variable.data is not None and variable.data.size:
                storage = np.zeros(-(-variable.size // 16) * 16 + variable.align, np.uint8)
                head = -storage.ctypes.data % variable.align
                array = storage[head : head + variable.size]
                array[:] = variable.data
                self.constants[variable.name] = self.memory.add(
                    variable.name, array, writable=variable.space == "global"
                )

    def start(self, memory: Memory, parameters: list[bytes], grid: tuple[int, int, int], first_block: int) -> None:
        """Prepares the blocks `first_block ...` of the grid."""
        for array, value in zip(self.parameters.values(), parameters, strict=True):
            array[:] = np.frombuffer(value, np.uint8)
        for axis, size in zip("xyz", grid, strict=True):
            self.special[f"%nctaid.{axis}"].fill(size)
        number = first_block + self.block
        self.special["%ctaid.x"][:] = number % grid[0]
        self.special["%ctaid.y"][:] = number // grid[0] % grid[1]
        self.special["%ctaid.z"][:] = number // (grid[0] * grid[1])
        for written in self.written.values():
            written.fill(False)
        self.local_defined.fill(False)
        self.shared.reset()
        self.target_memory = memory
        if self.constants:
            self.target_memory = memory.joined(self.memory)

    def register(self, register: Register) -> np.ndarray:
        array = self.registers.get(register)
        if array is None:
            array = self.registers[register] = np.zeros(self.lanes, WORDS[register.width])
        return array

    def scratch(self, dtype, slot: int = 0) -> np.ndarray:
        """An array over all lanes for use within one instruction."""
        key = np.dtype(dtype), slot
        if key not in self._scratch:
            self._scratch[key] = np.empty(self.lanes, dtype)
        return self._scratch[key]

    def buffers(self, key: str, *shapes: tuple[int, ...]) -> list[np.ndarray]:
        """f32 arrays, zero at first, shared by all instructions that ask with the same key and shapes."""
        if (key, shapes) not in self._scratch:
            self._scratch[key, shapes] = [np.zeros(shape, np.float32) for shape in shapes]
        return self._scratch[key, shapes]

    def whole_warps(self, mask, what: str) -> np.ndarray | slice:
        """The warps (of the batch) that execute; a Fault if one of them does so with a part of its lanes."""
        if mask is True:
            return slice(None)
        lanes = mask.reshape(-1, WARP)
        some = lanes.any(1)
        partial = some & ~lanes.all(1)
        if partial.any():
            warp = int(np.flatnonzero(partial)[0])
            count = int(lanes[warp].sum())
            lane = warp * WARP + int(np.flatnonzero(lanes[warp])[0])
            raise PartialWarp(f"{what} by a partial warp: {count} of its lanes are active", lane)
        return np.flatnonzero(some)

    def check_member_mask(self, mask, members: np.ndarray, what: str) -> None:
        """The lanes that execute a .sync instruction together are exactly those that its mask names."""
        if mask is True:
            active = np.full(self.lanes // WARP, 0xFFFFFFFF, np.uint32)
        else:
            active = np.packbits(mask.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)[:, 0]
        wrong = members != np.repeat(active, WARP)
        if mask is not True:
            wrong &= mask
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            named, there = int(members[lane]), int(active[lane // WARP])
            raise PartialWarp(f"{what}: its mask names lanes {named:#010x}, the active lanes are {there:#010x}", lane)


def lanes_of(mask):
    """What selects the active lanes of an array: everything, or their numbers."""
    return slice(None) if mask is True else np.flatnonzero(mask)


def translated(lanes, function, *arguments):
    """Calls a function of compacted lanes; the lane of its Fault becomes a lane of the batch."""
    try:
        return function(*arguments)
    except Fault as fault:
        if fault.lane is not None and not isinstance(lanes, slice):
            fault.lane = int(lanes[fault.lane])
        raise
