"""Fair allocation: a setting of the C library's malloc with which page faults do not count as speed of kernels.

By default glibc returns large freed blocks to the system, so every call that allocates a large temporary pays for
faulting its pages in again. This cost belongs to the allocator's settings, and is largest for the provider with the
most temporaries. With large thresholds memory is kept and reused. Malloc reads the thresholds when a process starts, so
pytest must be restarted with them.
"""

from __future__ import annotations

import os
import platform
import resource
import sys

import pytest

TUNABLES = ("glibc.malloc.mmap_threshold=1073741824", "glibc.malloc.trim_threshold=4294967296")
_VARIABLE = "GLIBC_TUNABLES"


def is_fair() -> bool:
    """Whether this process started with the thresholds."""
    return set(TUNABLES) <= set(os.environ.get(_VARIABLE, "").split(":"))


def mode() -> str:
    """A phrase for the table that says how this process allocates."""
    if is_fair():
        return "fair allocation (freed memory is kept: " + ":".join(TUNABLES) + ")"
    return "plain allocation (page faults of temporaries are part of the times)"


def fair_environment() -> dict[str, str]:
    """This environment with the thresholds added to the tunables that the user has set."""
    others = [item for item in os.environ.get(_VARIABLE, "").split(":") if item and item not in TUNABLES]
    return {**os.environ, _VARIABLE: ":".join([*others, *TUNABLES])}


def plain_environment() -> dict[str, str]:
    """This environment without the thresholds."""
    others = [item for item in os.environ.get(_VARIABLE, "").split(":") if item and item not in TUNABLES]
    environment = {**os.environ, _VARIABLE: ":".join(others)}
    if not others:
        del environment[_VARIABLE]
    return environment


def restart_if_needed(config: pytest.Config) -> None:
    """Replaces this process by the same pytest command with fair allocation.

    This happens once, because the new process finds the thresholds set. It does not happen if it would have no effect
    (not glibc), if nothing will be measured (--collect-only, --help), or if it would restart something other than
    pytest (a worker, a program that calls pytest.main); the table then says "plain allocation".
    """
    option = config.option
    if is_fair() or platform.libc_ver()[0] != "glibc" or option.collectonly or getattr(option, "help", False):
        return
    if hasattr(config, "workerinput") or list(config.invocation_params.args) != sys.argv[1:]:
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()  # otherwise the output of the new process would go to the captured descriptors
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], fair_environment())


def faults_per_call(function, calls: int = 5) -> float:
    """Minor page faults of the whole process per call, over a few calls."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
