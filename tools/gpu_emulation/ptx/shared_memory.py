"""Shared memory of a batch of blocks, with a record of which warp wrote and read what since the last barrier.

The machine runs in lock-step, which hides missing barriers: data arrive in time although a GPU would not guarantee it.
So every granule (the size of the kernel's narrowest access to shared memory) has a tag of its last write, which is the
barrier epoch and the warp, and the epoch of the last read by each warp. Two accesses by different warps in one epoch
are a race, which is an error, if at least one of them is a write. The exception is a write that stores the value that
is there already. Accesses of one warp count as ordered.

Tags are `epoch << 6 | warp`. UNWRITTEN and IN_FLIGHT are greater than any tag, so one comparison with the current epoch
finds everything that needs a closer look.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import Fault
from .memory import UNITS

UNWRITTEN, IN_FLIGHT = np.uint32(0xFFFFFFFF), np.uint32(0xF0000000)
EPOCH, WARP_BITS, ATOMIC = 64, 63, 62


@dataclass
class _Copy:
    """A cp.async instruction of some lanes that has not been retired. `group` counts each lane's commits before it."""

    lanes: np.ndarray
    group: np.ndarray
    address: np.ndarray
    data: np.ndarray


class SharedMemory:
    """`size` bytes for each of `blocks` blocks. `warp` (lanes,) is each lane's warp within its block."""

    def __init__(self, blocks: int, size: int, granule: int, warp: np.ndarray, block: np.ndarray):
        self.size, self.granule = size, granule
        self.warps = int(warp.max()) + 1
        self.stride = -(-max(size, 16) // 16) * 16
        self._raw = np.empty(blocks * self.stride // 16, np.complex128)
        self._views = {width: self._raw.view(unit) for width, unit in UNITS.items()}
        granules = blocks * self.stride // granule
        self._written = np.empty(granules, np.uint32)
        self._last_read = np.empty(granules, np.uint32)
        self._reads = np.empty(granules * self.warps, np.uint32)  # (warps, granules): the epoch's tag
        self._warp = warp.astype(np.uint32)
        self._block = block.astype(np.int64) * self.stride
        self._reads_row = warp.astype(np.int64) * granules
        self._granules = granules
        self.epoch = np.empty(warp.size, np.uint32)  # per lane: the first tag of its block's epoch
        self.tag = np.empty(warp.size, np.uint32)
        self.commits = np.zeros(warp.size, np.int64)
        self.reset()

    def reset(self) -> None:
        """Resets to the state at the start of a block, in which nothing is defined."""
        self._views[1].fill(0xFF)
        self._written.fill(UNWRITTEN)
        self._last_read.fill(0)
        self._reads.fill(0)
        self.epoch.fill(EPOCH)
        np.bitwise_or(self.epoch, self._warp, out=self.tag)
        self.commits.fill(0)
        self._pending: list[_Copy] = []

    def barrier(self, mask) -> None:
        """All warps of the blocks whose lanes are in `mask` have met. Later accesses are ordered after earlier ones."""
        np.add(self.epoch, np.uint32(EPOCH), out=self.epoch, where=mask)
        np.bitwise_or(self.epoch, self._warp, out=self.tag)

    # ---- Accesses. `address` (n,) are offsets in the block's window, `lanes` (n,) the lanes or slice(None) for all.

    def _locate(self, address: np.ndarray, lanes, width: int) -> np.ndarray:
        if int(np.bitwise_or.reduce(address)) & (width - 1):
            position = int(np.flatnonzero(address & (width - 1))[0])
            raise Fault(f"misaligned shared access of {width} bytes at {int(address[position])}", position)
        if int(address.min()) < 0 or int(address.max()) + width > self.size:
            position = int(np.flatnonzero((address < 0) | (address + width > self.size))[0])
            place = int(address[position])
            message = f"shared access out of bounds: {width} bytes at {place} of {self.size}"
            raise Fault(message, position)
        return address + self._block[lanes]

    def _granules_of(self, place: np.ndarray, width: int):
        shift = self.granule.bit_length() - 1
        first = place >> shift
        yield first
        for i in range(1, width // self.granule):
            yield first + i

    def read(self, address: np.ndarray, lanes, width: int) -> np.ndarray:
        place = self._locate(address, lanes, width)
        epoch, tag, row = self.epoch[lanes], self.tag[lanes], self._reads_row[lanes]
        for granule in self._granules_of(place, width):
            written = self._written.take(granule)
            ok = (written < epoch) | (written == tag)
            if not ok.all():
                self._refuse_read(np.flatnonzero(~ok), written, tag, address)
            self._last_read[granule] = tag
            self._reads[row + granule] = epoch
        return self._views[width].take(place >> (width.bit_length() - 1))

    def write(self, address: np.ndarray, lanes, width: int, values: np.ndarray) -> None:
        place = self._locate(address, lanes, width)
        index = place >> (width.bit_length() - 1)
        elements = self._views[width]
        for granule in self._granules_of(place, width):
            self._check_write(granule, lanes, address, lambda: _same(elements.take(index), values))
            self._written[granule] = self.tag[lanes]
        elements[index] = values
        different = ~_same(elements.take(index), values)
        if different.any():
            position = int(np.flatnonzero(different)[0])
            message = f"two lanes of one instruction store different values at shared {int(address[position])}"
            raise Fault(message, position)

    def atomic(self, address: np.ndarray, lanes, width: int, update) -> np.ndarray:
        """Applies `update(old, i) -> new` lane after lane and returns the old values. Only atomics are ordered by
        it."""
        place = self._locate(address, lanes, width)
        epoch = self.epoch[lanes]
        for granule in self._granules_of(place, width):
            written = self._written.take(granule)
            ok = (written < epoch) | (written == self.tag[lanes]) | (written == (epoch | ATOMIC))
            if not ok.all():
                self._refuse_read(np.flatnonzero(~ok), written, self.tag[lanes], address)
            self._check_readers(granule, lanes, address, None)
            self._written[granule] = epoch | ATOMIC
        elements = self._views[width]
        old = np.empty(address.size, elements.dtype)
        for i, position in enumerate(place // width):
            old[i] = elements[position]
            elements[position] = update(old[i], i)
        return old

    def _refuse_read(self, positions, written, tag, address) -> None:
        position = int(positions[0])
        found, place = int(written[position]), int(address[position])
        if found == UNWRITTEN:
            raise Fault(f"read of uninitialised shared memory at {place}", position)
        if found >= IN_FLIGHT:
            raise Fault(f"read of shared memory at {place} while a cp.async to it is in flight", position)
        raise Fault(_race("read", "written", place, found, tag[position]), position)

    def _check_write(self, granule, lanes, address, same) -> None:
        """`same` tells which lanes store the value that is there already, which is no race."""
        written, tag = self._written.take(granule), self.tag[lanes]
        ok = (written < self.epoch[lanes]) | (written == tag) | (written == UNWRITTEN)
        if not ok.all():
            flying = np.flatnonzero(~ok & (written >= IN_FLIGHT))
            if flying.size:
                place = int(address[flying[0]])
                raise Fault(f"write to shared memory at {place} while a cp.async to it is in flight", int(flying[0]))
            racing = np.flatnonzero(~ok & ~same())
            if racing.size:
                position = int(racing[0])
                found = int(written[position])
                raise Fault(_race("write", "written", int(address[position]), found, tag[position]), position)
        self._check_readers(granule, lanes, address, same)

    def _check_readers(self, granule, lanes, address, same) -> None:
        epoch = self.epoch[lanes]
        recent = self._last_read.take(granule) >= epoch
        if not recent.any():
            return
        positions = np.flatnonzero(recent if same is None else recent & ~same())
        own = self._warp[lanes][positions]
        for warp in range(self.warps):
            tags = self._reads.take(granule[positions] + warp * self._granules)
            racing = np.flatnonzero((tags == epoch[positions]) & (own != warp))
            if racing.size:
                position = int(positions[racing[0]])
                found = int(epoch[position]) | warp
                raise Fault(_race("write", "read", int(address[position]), found, self.tag[lanes][position]), position)

    # ---- cp.async

    def copy(self, address: np.ndarray, lanes, width: int, data: np.ndarray) -> None:
        """Starts an asynchronous copy. Accessing its bytes is an error until the wait that retires its group."""
        place = self._locate(address, lanes, width)
        for granule in self._granules_of(place, width):
            self._check_write(granule, lanes, address, lambda: np.zeros(address.size, bool))
            self._written[granule] = IN_FLIGHT
        elements = self._views[width]
        elements[place >> (width.bit_length() - 1)] = np.full(width, 0xFF, np.uint8).view(elements.dtype)[0]
        lanes = np.arange(self.commits.size) if isinstance(lanes, slice) else lanes
        self._pending.append(_Copy(lanes, self.commits[lanes], place, data))

    def commit(self, mask) -> None:
        np.add(self.commits, 1, out=self.commits, where=mask)

    def wait(self, mask, allowed: int | None) -> None:
        """Retires all groups of each lane except the last `allowed`. None retires all copies, committed or not."""
        remaining = []
        for entry in self._pending:
            landed = np.ones(entry.lanes.size, bool)
            if allowed is not None:
                landed = entry.group + allowed < self.commits[entry.lanes]
            if mask is not True:
                landed &= mask[entry.lanes]
            if landed.all():
                self._land(entry)
            elif landed.any():
                self._land(_part(entry, landed))
                remaining.append(_part(entry, ~landed))
            else:
                remaining.append(entry)
        self._pending = remaining

    def _land(self, entry: _Copy) -> None:
        width = entry.data.dtype.itemsize
        self._views[width][entry.address >> (width.bit_length() - 1)] = entry.data
        for granule in self._granules_of(entry.address, width):
            self._written[granule] = self.tag[entry.lanes]


def _part(entry: _Copy, chosen: np.ndarray) -> _Copy:
    return _Copy(entry.lanes[chosen], entry.group[chosen], entry.address[chosen], entry.data[chosen])


def _same(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Equality of bits, element by element."""
    if left.dtype.itemsize == 16:
        return (left.view(np.uint64).reshape(-1, 2) == right.view(np.uint64).reshape(-1, 2)).all(1)
    return left == right


def _race(access: str, other: str, place: int, found: int, own: int) -> str:
    who = "atomically" if found & WARP_BITS == ATOMIC else f"by warp {found & WARP_BITS}"
    return (
        f"race in shared memory at {place}: {access} by warp {int(own) & WARP_BITS}, {other} {who} "
        "with no barrier between"
    )
