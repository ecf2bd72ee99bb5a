"""Runs Python code in a process that preloads AddressSanitizer, for the variant ``sanitized`` and the CPU kernels."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from var_kernels.native import build

# A flag for g++: a call checks each access, instead of code in place. This compiles in three quarters of the time.
CHECKED_BY_CALLS = "--param asan-instrumentation-with-call-threshold=0"
_ROOT = Path(__file__).resolve().parents[3]
# No leaks, because Python and torch do not free everything at exit. No fake stacks, because fibers have their own
# stacks. No colours, whatever this process's environment says, because tests read the output.
_OPTIONS = "detect_leaks=0:detect_stack_use_after_return=0:color=never"


def run_sanitized(code: str, *, timeout: float = 300) -> subprocess.CompletedProcess:
    """The output of `code` and its exit status. The checkout is on its path. A finding ends the process with status
    1."""
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
