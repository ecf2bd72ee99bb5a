"""Global memory: registered numpy arrays at their real addresses. Every access is checked."""

from __future__ import annotations

import bisect

import numpy as np

from .errors import Fault

# Elements are only moved, so complex128 serves as numpy's native 16-byte element.
UNITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}


class Buffer:
    def __init__(self, name: str, array: np.ndarray, writable: bool, defined):
        if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
            raise ValueError(f"buffer {name!r}: expected a C-contiguous numpy array, got {type(array).__name__}")
        if writable and not array.flags.writeable:
            raise ValueError(f"buffer {name!r}: the array is read-only; pass writable=False")
        self.name, self.writable, self.array = name, writable, array
        self.bytes = array.reshape(-1).view(np.uint8)
        self.start, self.size = array.ctypes.data, self.bytes.size
        self.defined = self._defined_bytes(array, defined)
        self._views: dict[int, tuple[int, np.ndarray]] = {}

    def _defined_bytes(self, array: np.ndarray, defined) -> np.ndarray | None:
        if defined is True or defined is None:
            return None
        if defined is False:
            return np.zeros(self.size, bool)
        mask = np.ascontiguousarray(defined, dtype=bool)
        if mask.shape != array.shape:
            raise ValueError(f"buffer {self.name!r}: defined has shape {mask.shape}, the array {array.shape}")
        return np.repeat(mask.reshape(-1), array.itemsize)

    def view(self, width: int) -> tuple[int, np.ndarray]:
        """The first address that is a multiple of `width`, and the elements of `width` bytes from there on."""
        if width not in self._views:
            head = min(-self.start % width, self.size)
            count = (self.size - head) // width
            elements = self.bytes[head : head + count * width].view(UNITS[width])
            self._views[width] = self.start + head, elements
        return self._views[width]


class Memory:
    """The device's global memory.

    Addresses are the host addresses of the arrays; an access outside all of them is an error.
    """

    def __init__(self):
        self._buffers: list[Buffer] = []
        self._starts: list[int] = []

    def add(self, name: str, array: np.ndarray, *, writable: bool = True, defined=True) -> int:
        """Registers a C-contiguous array (any dtype) and returns its address, `array.ctypes.data`.

        `writable=False`: a store is an error. `defined=False`, or a boolean mask of the array's shape: reading an
        element before a store has written it is an error. Raises ValueError for other arrays and for overlaps.
        """
        buffer = Buffer(name, array, writable, defined)
        if buffer.size == 0:
            return buffer.start
        position = bisect.bisect(self._starts, buffer.start)
        for other in self._buffers[max(position - 1, 0) : position + 1]:
            if other.start < buffer.start + buffer.size and buffer.start < other.start + other.size:
                raise ValueError(f"buffer {name!r} overlaps buffer {other.name!r}")
        self._buffers.insert(position, buffer)
        self._starts.insert(position, buffer.start)
        return buffer.start

    def defined(self, name: str) -> np.ndarray | None:
        """Which bytes of the buffer hold a defined value now. None if it was added as defined."""
        return next(buffer.defined for buffer in self._buffers if buffer.name == name)

    def joined(self, other: Memory) -> Memory:
        """The same buffers and those of `other`, in one table."""
        both = Memory()
        both._buffers = sorted(self._buffers + other._buffers, key=lambda buffer: buffer.start)
        both._starts = [buffer.start for buffer in both._buffers]
        return both

    def read(self, address: np.ndarray, width: int) -> np.ndarray:
        """The `width`-byte elements at the addresses (n,) int64. A Fault's lane is the position in `address`."""
        buffer = self._single(address, width)
        if buffer is not None:
            return self._read_buffer(buffer, address, width)
        values = np.empty(address.size, UNITS[width])
        for buffer, chosen in self._by_buffer(address, width):
            values[chosen] = self._read_buffer(buffer, address[chosen], width, chosen)
        return values

    def write(self, address: np.ndarray, width: int, values: np.ndarray) -> None:
        """Stores elements. If several lanes write to one address, the last lane wins."""
        buffer = self._single(address, width)
        parts = [(buffer, slice(None))] if buffer is not None else self._by_buffer(address, width)
        for buffer, chosen in parts:
            if not buffer.writable:
                lane = 0 if isinstance(chosen, slice) else int(chosen[0])
                raise Fault(f"write to the read-only buffer {buffer.name!r}", lane)
            base, elements = buffer.view(width)
            index = (address[chosen] - base) // width
            elements[index] = values[chosen]
            if buffer.defined is not None:
                first = address[chosen] - buffer.start
                for i in range(width):
                    buffer.defined[first + i] = True

    def _single(self, address: np.ndarray, width: int) -> Buffer | None:
        """The buffer that holds all addresses, if there is one. Also checks alignment."""
        if int(np.bitwise_or.reduce(address)) & (width - 1):
            lane = int(np.flatnonzero(address & (width - 1))[0])
            raise Fault(f"misaligned access of {width} bytes at {int(address[lane]):#x}", lane)
        low, high = int(address.min()), int(address.max()) + width
        position = bisect.bisect(self._starts, low) - 1
        if position >= 0:
            buffer = self._buffers[position]
            if high <= buffer.start + buffer.size:
                return buffer
        return None

    def _by_buffer(self, address: np.ndarray, width: int) -> list[tuple[Buffer, np.ndarray]]:
        owner = np.searchsorted(np.array(self._starts, np.int64), address, side="right") - 1
        ends = np.array([buffer.start + buffer.size for buffer in self._buffers] + [0], np.int64)
        outside = np.flatnonzero((owner < 0) | (address + width > ends[owner]))
        if outside.size:
            lane = int(outside[0])
            raise Fault(f"global access out of bounds: {self._where(int(address[lane]), width)}", lane)
        return [(self._buffers[i], np.flatnonzero(owner == i)) for i in np.unique(owner)]

    def _where(self, address: int, width: int) -> str:
        def distance(buffer: Buffer) -> int:
            return max(buffer.start - address, address + width - buffer.start - buffer.size)

        if not self._buffers:
            return f"{width} bytes at {address:#x}; no buffer is registered"
        nearest = min(self._buffers, key=distance)
        end = nearest.start + nearest.size
        if address < nearest.start:
            place = f"{nearest.start - address} bytes before the start"
        else:
            place = f"{address + width - end} bytes past the end"
        return f"{width} bytes at {address:#x}, {place} of buffer {nearest.name!r} ({nearest.size} bytes)"

    @staticmethod
    def _read_buffer(buffer: Buffer, address: np.ndarray, width: int, chosen=None) -> np.ndarray:
        if buffer.defined is not None:
            first = address - buffer.start
            for i in range(width):
                if not buffer.defined[first + i].all():
                    lane = int(np.flatnonzero(~buffer.defined[first + i])[0])
                    message = f"read of a byte of {buffer.name!r} that was never written, at offset {first[lane] + i}"
                    raise Fault(message, lane if chosen is None else int(chosen[lane]))
        base, elements = buffer.view(width)
        return elements.take((address - base) >> (width.bit_length() - 1))
