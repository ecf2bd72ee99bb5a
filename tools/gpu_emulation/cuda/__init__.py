"""Executes CUDA kernels on the CPU, from unchanged .cu files, with one fiber per CUDA thread.

    emulation = load("race", kernel_sources())
    with emulation.run(seed=1, late_copies=True):
        emulation.ops._adaln_layer_norm(x, scale, shift, 1e-6)

If the emulation finds an error, the block raises :class:`EmulationError` at its end. The emulation cannot check speed,
the assembly inside `csrc/cuda/device.cuh`, or the memory model beyond barriers, because its memory is sequentially
consistent.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from var_kernels import backends
from var_kernels.native import build as native_build
from var_kernels.native import library

from . import binding, build
from .nvcc import plain_name

__all__ = [
    "Emulation", "EmulationError", "Executor", "Launch", "Report", "Run", "as_backend", "kernel_sources", "load",
    "load_built", "serving",
]  # fmt: skip


# Few, so that small tests have shapes that fill the device and shapes that do not.
MULTIPROCESSORS = 6


@dataclass(frozen=True)
class Report:
    """One finding.

    `kind` is one of race, cross_block_race, undefined, in_flight, async_copy, out_of_bounds, misaligned, divergence,
    barrier, deadlock, launch. `other_thread` is the second thread of a race inside a block, else -1. `where` is
    "file:line" of the access, and `kernel` the function's name; both are empty if they could not be found.
    """

    kind: str
    message: str
    block: tuple[int, int, int]
    thread: int
    other_thread: int
    count: int
    kernel: str
    where: str

    def __str__(self) -> str:
        who = f"block {self.block}, thread {self.thread}" + (
            f" and thread {self.other_thread}" if self.other_thread >= 0 else ""
        )
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.kind}: {self.message}{times} [{who}; {self.where or 'unknown line'}; {self.kernel}]"


class EmulationError(AssertionError):
    """The emulation found errors, most of which a GPU would not report. `reports` has the details."""

    def __init__(self, reports: Sequence[Report]) -> None:
        super().__init__("\n".join(map(str, reports)))
        self.reports = tuple(reports)


@dataclass(frozen=True)
class Launch:
    """One launch. `parameters` are the bytes of each parameter. `buffers` (begin, end, name, undefined) are the memory
    that the kernel may touch; undefined means that nothing has been written to it yet."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: list[bytes]
    buffers: list[tuple[int, int, str, bool]]


Executor = Callable[[Launch], None]


@dataclass
class Run:
    """The counters of a `with emulation.run()` block, complete at its end."""

    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Emulation:
    """A loaded module. `ops` are its raw ops, which take CPU tensors."""

    namespace: str
    path: Path
    module: binding.Module

    @property
    def ops(self):
        return getattr(torch.ops, self.namespace)

    @contextlib.contextmanager
    def run(
        self,
        *,
        seed: int = 0,
        late_copies: bool = True,
        executor: Executor | None = None,
        multiprocessors: int = MULTIPROCESSORS,
        fill_outputs: bool = True,
        **buffers: torch.Tensor,
    ) -> Iterator[Run]:
        """Inside this block, threads and blocks run in an order given by `seed`: 0 in order, 1 in reverse, else random.

        `late_copies`: the data of cp.async arrive when they are waited for, else when the copy is issued. `executor`:
        executes the launches instead of fibers. `multiprocessors`: how many the device has. `fill_outputs`: fills new
        tensors with NaN before kernels write them. `buffers`: memory, by name, that kernels use without being called
        through an op. Raises EmulationError for the errors found, or the error that the executor raised.
        """
        failures: list[Exception] = []
        guarded = self._guard(executor, failures) if executor else None
        self.module.begin(seed, late_copies, multiprocessors, fill_outputs, guarded)
        for name, tensor in buffers.items():
            self.module.add_buffer(tensor.data_ptr(), tensor.untyped_storage().nbytes(), name)
        run, problem = Run(), None
        try:
            yield run
        except RuntimeError as error:  # from the entry function, because a launch failed; the reports say why
            problem = error
        finally:
            self.module.end()
        run.counters.update(self.module.counters())
        if failures:
            raise failures[0]
        if found := self.module.reports():
            raise EmulationError(self._resolve(found)) from problem
        if problem is not None:
            raise problem

    def record(self, call: Callable[[], object], multiprocessors: int) -> list[Launch]:
        """The launches of `call` on a device with this number of multiprocessors. Nothing is run and tensors are not
        touched, so even large tensors cost address space only."""
        launches: list[Launch] = []
        with self.run(executor=launches.append, multiprocessors=multiprocessors, fill_outputs=False):
            call()
        return launches

    def _guard(self, executor: Executor, failures: list[Exception]) -> Callable[[dict], bool]:
        def execute(launch: dict) -> bool:
            try:
                name = _places(self.path, (launch.pop("kernel"),))[0][0]
                executor(Launch(kernel=name, **launch))
            except Exception as error:  # stored, because its type would be lost on the way through C++
                failures.append(error)
            return not failures

        return execute

    def _resolve(self, found: Sequence[dict]) -> list[Report]:
        addresses = [entry[key] for entry in found for key in ("kernel", "code")]
        places = _places(self.path, tuple(addresses))
        reports = []
        for entry, kernel, code in zip(found, places[::2], places[1::2], strict=True):
            known = {key: value for key, value in entry.items() if key not in ("kernel", "code")}
            reports.append(Report(**known, kernel=kernel[0], where=code[1]))
        return reports


@functools.lru_cache(maxsize=1024)
def _places(path: Path, addresses: Sequence[int]) -> list[tuple[str, str]]:
    """(function, "file:line") of each address in the library."""
    if not shutil.which("addr2line"):
        return [("", "")] * len(addresses)
    # A return address is that of the instruction after the call, so the call itself is found one byte before.
    hexadecimal = [hex(address - 1 if i % 2 and address else address) for i, address in enumerate(addresses)]
    command = ["addr2line", "-f", "-C", "-e", str(path), *hexadecimal]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    names = [plain_name(line) for line in lines[::2]]
    files = [re.sub(r" \(discriminator.*|^\?\?.*", "", line).rpartition("/")[2] for line in lines[1::2]]
    return list(zip(names, files, strict=True))


@contextlib.contextmanager
def as_backend(emulation: Emulation) -> Iterator[None]:
    """Inside this context, ``backend="cuda"`` of the public functions is the emulation, on CPU tensors."""
    with (
        mock.patch.dict(backends._DEVICES, cuda=("cpu",)),
        mock.patch.object(backends, "_cuda_reason", lambda op: None),
        mock.patch.dict(library.NAMESPACES, cuda=emulation.namespace),
    ):
        yield


@contextlib.contextmanager
def serving(emulation: Emulation, **options) -> Iterator[Run]:
    """`as_backend` and `Emulation.run` together: ``backend="cuda"`` is the emulation, which runs with these options."""
    with as_backend(emulation), emulation.run(**options) as run:
        yield run


def kernel_sources() -> list[Path]:
    """Every CUDA file of the package."""
    return sorted((native_build.CSRC / "cuda").glob("*.cu"))


_loaded: dict[Path, tuple[Emulation, torch.library.Library]] = {}


def load(variant: str, sources: Sequence[Path]) -> Emulation:
    """Loads the module of these .cu files, which is built if it is not in the cache. `variant`: see :mod:`.build`."""
    return load_built(build.build(variant, sources))


def load_built(path: Path) -> Emulation:
    """Loads a built module. Each module has its own namespace, so a process can use several of them."""
    if path not in _loaded:
        namespace = f"var_kernels_emulated_{len(_loaded)}"
        schemas = library.define_again(namespace)
        _loaded[path] = Emulation(namespace, path, binding.Module(path, namespace)), schemas
    return _loaded[path][0]
