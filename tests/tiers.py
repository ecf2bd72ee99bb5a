"""The tiers of the tests: which tests belong to which, by their place in the tree, and which of them a run takes.

A run without options takes what every edit needs. What takes minutes is in tiers of its own, which `--all` adds; a
file or a test that is named, and a `-m` of one's own, run whatever their tier is.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TIERS = {
    "emulated": "the GPU kernels on a CPU: CUDA C++ in the emulation, Triton in its interpreter, PTX",
    "evidence": "machine code, planted faults, races, sanitizers, lower instruction sets, builds by nvcc",
    "packaging": "installations and builds in fresh environments",
    "gpu": "needs a GPU",
}
# The tier of every test in the files that match. Single tests of other files carry the marker themselves.
_PATHS = {
    "evidence": (
        "tests/emulation/test_report*.py", "tests/kernels/test_triton_mutants.py", "tests/kernels/test_lower_levels.py",
        "tests/kernels/test_cpu_sanitizers.py", "tests/packaging/test_cuda_library.py",
    ),
    "emulated": (
        "tests/kernels/*/test_cuda*.py", "tests/kernels/*/test_triton*.py", "tests/model/test_cuda_model.py",
        "tests/emulation/*",
    ),
    "packaging": ("tests/packaging/test_installation.py", "tests/packaging/test_packaging.py"),
    "gpu": ("tests/kernels/test_gpu.py",),
}  # fmt: skip


def tiers_of(path: Path) -> list[str]:
    """The tiers of all tests in this file."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return [tier for tier, patterns in _PATHS.items() if any(fnmatch(name, pattern) for pattern in patterns)]


def mark(items: Iterable[pytest.Item]) -> None:
    """Adds the marker of its tiers to every test; a test that is evidence is in no cheaper tier as well."""
    for item in items:
        for tier in tiers_of(item.path):
            if tier != "emulated" or not item.get_closest_marker("evidence"):
                item.add_marker(tier)


def is_left_out(item: pytest.Item, named: Iterable[Path]) -> bool:
    """Whether a run without options leaves out a test, unless its file is among those that were named."""
    if item.path in named:
        return False
    return any(item.get_closest_marker(tier) for tier in TIERS)
