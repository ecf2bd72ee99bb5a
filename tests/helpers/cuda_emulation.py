"""The CUDA kernels of an op in the emulation, for the tests of that op."""

import functools
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path

from tools.gpu_emulation.cuda import Emulation, build, load, serving
from tools.gpu_emulation.cuda.sanitized import run_sanitized

_PROGRAM = """
import torch
torch.set_num_threads(1)
{}
print("clean")
"""


class EmulatedKernels:
    """The kernels of the CUDA files `sources`, compiled once for each variant of the emulation that a test asks for."""

    def __init__(self, *sources: Path):
        self.sources = sources
        self.load = functools.cache(lambda variant: load(variant, sources))

    def serving(self, variant: str | Emulation = "fast", **options) -> AbstractContextManager:
        """A context in which backend="cuda" is the emulation; raises EmulationError with its findings.

        `variant` is the name of a variant, or an emulation that is loaded already, such as one with a planted fault.
        """
        return serving(self.load(variant) if isinstance(variant, str) else variant, **options)

    def assert_sanitizers_find_nothing(self, program: str) -> None:
        """Runs `program` in a process with AddressSanitizer and UndefinedBehaviorSanitizer, which must find nothing.

        The program is Python, may be indented, and finds `torch` imported; it calls kernels of the variant "sanitized".
        The first finding of a sanitizer ends the process.
        """
        build.build("sanitized", self.sources)
        answer = run_sanitized(_PROGRAM.format(textwrap.dedent(program)))
        assert (answer.returncode, answer.stdout) == (0, "clean\n"), answer.stderr[-4000:]
