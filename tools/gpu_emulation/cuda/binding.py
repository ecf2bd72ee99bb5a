"""Controls a compiled module through ctypes. emu_bindings.cpp has the same structures and functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_int, c_uint, c_uint64, c_void_p
from pathlib import Path

_Index = c_uint * 3


class _Parameter(Structure):
    _fields_ = [("value", c_void_p), ("bytes", c_uint64)]


class _Buffer(Structure):
    _fields_ = [("begin", c_uint64), ("end", c_uint64), ("name", c_char_p), ("undefined", c_int)]


class _Launch(Structure):
    _fields_ = [
        ("kernel", c_uint64), ("shared_bytes", c_uint64), ("grid", _Index), ("block", _Index),
        ("parameter_count", c_uint64), ("parameters", POINTER(_Parameter)),
        ("buffer_count", c_uint64), ("buffers", POINTER(_Buffer)),
    ]  # fmt: skip

    def described(self) -> dict:
        """The fields of `Launch`, except that the kernel is an address in the module's file."""
        parameters = [self.parameters[i] for i in range(self.parameter_count)]
        buffers = [self.buffers[i] for i in range(self.buffer_count)]
        return {
            "kernel": self.kernel,
            "grid": tuple(self.grid),
            "block": tuple(self.block),
            "shared_bytes": self.shared_bytes,
            "parameters": [ctypes.string_at(each.value, each.bytes) for each in parameters],
            "buffers": [(each.begin, each.end, each.name.decode(), bool(each.undefined)) for each in buffers],
        }


class _Report(Structure):
    _fields_ = [
        ("kind", c_char_p), ("message", c_char_p), ("kernel", c_uint64), ("code", c_uint64), ("block", _Index),
        ("thread", c_int), ("other_thread", c_int), ("count", c_uint64),
    ]  # fmt: skip

    def described(self) -> dict:
        """The fields of `Report`, except that the kernel and the code are addresses in the module's file."""
        known = {name: getattr(self, name) for name in ("kernel", "code", "thread", "other_thread", "count")}
        return known | {"kind": self.kind.decode(), "message": self.message.decode(), "block": tuple(self.block)}


_COUNTERS = (
    "launches", "blocks", "switches", "collectives", "mma", "ldmatrix", "bank_conflicts", "async_copies", "accesses",
)  # fmt: skip


class _Counters(Structure):
    _fields_ = [(name, c_uint64) for name in _COUNTERS]


_Executor = ctypes.CFUNCTYPE(c_int, POINTER(_Launch))


class Module:
    """A compiled module, whose ops are registered in `namespace`. The namespace must have their schemas."""

    def __init__(self, path: Path, namespace: str) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emu_begin.argtypes = [c_uint64, c_int, c_int, c_int, _Executor]
        self._library.emu_report_count.restype = c_uint64
        self._library.emu_report.argtypes = [c_uint64, POINTER(_Report)]
        self._library.emu_counters.argtypes = [POINTER(_Counters)]
        self._library.emu_add_buffer.argtypes = [c_uint64, c_uint64, c_char_p]
        self._library.emu_register_ops.argtypes = [c_char_p]
        self._library.emu_register_ops(namespace.encode())
        self._executor = _Executor()

    def begin(
        self, seed: int, late_copies: bool, multiprocessors: int, fill_outputs: bool, execute: Callable | None
    ) -> None:
        """From now on kernels run with these settings. `execute` takes a launch as a dictionary, or is None."""

        def executor(launch) -> bool:
            return execute(launch.contents.described())

        # The library keeps the function's address, so the function must live until `end`.
        self._executor = _Executor(executor) if execute else _Executor()
        self._library.emu_begin(seed, late_copies, multiprocessors, fill_outputs, self._executor)

    def end(self) -> None:
        self._library.emu_end()
        self._executor = _Executor()

    def add_buffer(self, address: int, size: int, name: str) -> None:
        self._library.emu_add_buffer(address, size, name.encode())

    def reports(self) -> list[dict]:
        """The errors found since `begin`."""
        found = []
        for index in range(self._library.emu_report_count()):
            report = _Report()
            self._library.emu_report(index, report)
            found.append(report.described())
        return found

    def counters(self) -> dict[str, int]:
        """The counters since `begin`."""
        counters = _Counters()
        self._library.emu_counters(counters)
        return {name: getattr(counters, name) for name in _COUNTERS}
