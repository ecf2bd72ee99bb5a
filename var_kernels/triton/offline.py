"""Compiles a launch for a GPU that need not be present.

This follows the path of a real launch up to the binary: the same binder, the same specialisation of the arguments
(pointers and sizes divisible by 16, sizes equal to 1), the same cache. Only the active GPU is replaced.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .launch import Launch
from .targets import Target

_lock = threading.Lock()


class _Driver:
    """Answers what the JIT asks before it has a binary. The device number is the architecture, so each has its own
    cache."""

    def __init__(self, target: Target):
        self._target = GPUTarget(target.api, target.arch, target.warp_size)

    def get_current_device(self):
        return self._target.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self._target


@contextlib.contextmanager
def _active(target: Target) -> Iterator[None]:
    previous = driver._active
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver._active = previous


def compile_for(launch: Launch, target: Target):
    """The compiled kernel of `launch` for `target`. Its `asm` has "ptx" and "cubin", or "amdgcn" and "hsaco"; its
    `metadata` has the shared memory and the number of warps."""
    with _lock, _active(target):
        return launch.kernel.warmup(grid=launch.grid, **launch.keywords())


def compilations(kernel, target: Target) -> int:
    """How many specialisations of `kernel` this process has compiled for `target`."""
    caches = kernel.device_caches
    return len(caches[target.arch][0]) if target.arch in caches else 0
