"""Fair allocation: one setting of the C library's malloc, under which page faults are not counted as kernel speed.

By default glibc returns large freed blocks to the system, so every call that allocates a large temporary pays for
faulting its pages in again: a cost of the allocator's settings, largest for whoever has the most temporaries. With
large thresholds memory is kept and reused. Malloc reads them when a process starts, hence the re-execution.
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
    """How this process allocates, in words for the table."""
    if is_fair():
        return "fair allocation (freed memory is kept: " + ":".join(TUNABLES) + ")"
    return "plain allocation (page faults of temporaries are part of the times)"


def fair_environment() -> dict[str, str]:
    """This environment with the thresholds added to whatever tunables the user has set."""
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
    """Replace this process by the same pytest command in fair mode, once: the new process finds the thresholds set.

    Left out where it has no effect (not glibc), would measure nothing (--collect-only, --help), or would restart
    something other than pytest (a worker, a program that calls pytest.main); the table then says "plain allocation".
    """
    option = config.option
    if is_fair() or platform.libc_ver()[0] != "glibc" or option.collectonly or getattr(option, "help", False):
        return
    if hasattr(config, "workerinput") or list(config.invocation_params.args) != sys.argv[1:]:
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()  # else the new process would inherit, and lose, the captured descriptors
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], fair_environment())


def faults_per_call(function, calls: int = 5) -> float:
    """Minor page faults of the whole process per call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        function()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls
