"""Runs Python code in a process that preloads AddressSanitizer: the variant ``sanitized``, the CPU kernels."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from var_kernels.native import build

# Of g++: each access is checked by a call, not in place, which compiles in three quarters of the time.
CHECKED_BY_CALLS = "--param asan-instrumentation-with-call-threshold=0"
_ROOT = Path(__file__).resolve().parents[3]
# Python and torch do not free everything at exit; fibers bring stacks of their own; and a stop at the first finding
# must not print another process's idea of colours.
_OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0:color=never"


def run_sanitized(code: str, *, timeout: float = 300) -> subprocess.CompletedProcess:
    """What `code` printed, and its exit status; the checkout is on its path. A finding ends it with status 1."""
    compiler = shlex.split(build.find_compiler().command)
    libraries = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": _OPTIONS,
        "UBSAN_OPTIONS": "print_stacktrace=1:color=never",
        "PYTHONPATH": str(_ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment, capture_output=True, text=True, errors="replace", timeout=timeout,
    )  # fmt: skip
