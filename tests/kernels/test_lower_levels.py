"""Runs the CPU tests of all ops and models again at every lower instruction set, and without the native library.

Each run has a process of its own, because the level of the kernels is fixed when the library is loaded.
"""

import re
import subprocess
import sys

import pytest

from tests.helpers.processes import child_environment
from tests.tiers import ROOT, TIERS
from var_kernels.testing import isa_levels

# What calls kernels: the CPU tests of every op, the reference vectors and whole generations.
PLACES = [
    *sorted(path for path in (ROOT / "tests/kernels").iterdir() if (path / "__init__.py").is_file()),
    ROOT / "tests/model/test_model.py", ROOT / "tests/model/test_reference_vectors.py",
    ROOT / "tests/generation/test_generator.py",
]  # fmt: skip


# These tests take long and are the same at every level: those of memory, of tracing and of schemas. Without the library
# draws are those of the reference, which other tests compare with the kernel's, so their distribution is known.
SAME_AT_EVERY_LEVEL = ("memory", "compile", "export", "opcheck", "no_matrix_of_all_scores")
SAME_WITHOUT_THE_LIBRARY = ("follow_the_distribution",)


def outcome(*left_out: str, **changes: str) -> dict[str, int]:
    """How many tests pass, and how many are skipped, in a process with these environment variables."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", f"not ({' or '.join(TIERS)})"]
    command += ["-k", f"not ({' or '.join((*SAME_AT_EVERY_LEVEL, *left_out))})", *map(str, PLACES)]
    answer = subprocess.run(command, env=child_environment(**changes), cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-6000:] + answer.stderr[-2000:]
    return {what: int(count) for count, what in re.findall(r"(\d+) (\w+)", answer.stdout.splitlines()[-1])}


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_ops_at_a_lower_instruction_set(level):
    if level not in isa_levels()[:-1]:
        pytest.skip(f"{level} is not below the level of this process")
    counts = outcome(VAR_KERNELS_ISA=level)
    # At a level without kernels, nearly all tests would be skipped.
    assert counts["passed"] > 20 * counts.get("skipped", 0)


def test_ops_without_the_native_library():
    assert outcome(*SAME_WITHOUT_THE_LIBRARY, VAR_KERNELS_BUILD="none")["passed"]
