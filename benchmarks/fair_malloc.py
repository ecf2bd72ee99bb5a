"""Fair allocation, for which pytest is restarted with settings of malloc (`var_kernels._malloc`).

Without it, the page faults of temporaries count as speed of kernels. They belong to the allocator's settings, and are
most for the provider with the most temporaries.
"""

from __future__ import annotations

import os
import platform
import resource
import sys

import pytest

from var_kernels._malloc import TUNABLES, fair_environment, is_fair, plain_environment

__all__ = ["TUNABLES", "fair_environment", "faults_per_call", "is_fair", "mode", "plain_environment",
           "restart_if_needed"]  # fmt: skip


def mode() -> str:
    """A phrase for the table that says how this process allocates."""
    if is_fair():
        return "fair allocation (freed memory is kept: " + ":".join(TUNABLES) + ")"
    return "plain allocation (page faults of temporaries are part of the times)"


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
