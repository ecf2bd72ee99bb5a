"""Runs a test's program under AddressSanitizer and UndefinedBehaviorSanitizer, on CUDA kernels in the emulation."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from tools.gpu_emulation.cuda import build
from tools.gpu_emulation.cuda.sanitized import run_sanitized

_PROGRAM = """
import torch
torch.set_num_threads(1)
{}
print("clean")
"""


def assert_sanitizers_find_nothing(sources: Sequence[Path], program: str) -> None:
    """Compiles the CUDA files `sources` with the sanitizers and runs `program` in a process of its own.

    The program is Python, may be indented, and finds `torch` imported; it calls kernels of the variant "sanitized".
    The first finding of a sanitizer ends the process.
    """
    build.build("sanitized", sources)
    answer = run_sanitized(_PROGRAM.format(textwrap.dedent(program)))
    assert (answer.returncode, answer.stdout) == (0, "clean\n"), answer.stderr[-4000:]
