"""The tiers of the tests: to which tier a test belongs, by its place in the tree, and which tests a run includes.

A run without options includes what every edit needs. Tests that take minutes are in tiers, which `--all` adds. If a run
names a file or a test, or has an option `-m`, it includes them whatever their tier is.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TIERS = {
    "emulated": "the GPU kernels on a CPU: CUDA C++ in the emulation, Triton in its interpreter, PTX",
    "evidence": "machine code, planted faults, races, sanitizers, lower instruction sets, builds by nvcc, compilations",
    "packaging": "installations and builds in fresh environments, programs in processes of their own",
    "swaps": "models of other packages, before and after our ops are swapped in",
    "gpu": "needs a GPU",
}
# The tier of all tests in the files that match. Single tests of other files have the marker of a tier in their code.
_PATHS = {
    "evidence": (
        "tests/emulation/test_report*.py", "tests/kernels/test_triton_mutants.py", "tests/kernels/test_lower_levels.py",
        "tests/kernels/test_cpu_mutants.py", "tests/kernels/test_cpu_sanitizers.py",
        "tests/packaging/test_cuda_library.py", "tests/kernels/test_compile.py", "tests/model/test_compile.py",
    ),
    "emulated": (
        "tests/kernels/*/test_cuda*.py", "tests/kernels/*/test_triton*.py", "tests/model/test_cuda_model.py",
        "tests/emulation/*",
    ),
    "packaging": (
        "tests/packaging/test_installation.py", "tests/packaging/test_packaging.py", "tests/packaging/test_cache.py",
        "tests/cli/test_console.py", "tests/cli/test_two_writers.py",
    ),
    "swaps": (
        "tests/swap/test_diffusers*.py", "tests/swap/test_vector_quantize.py", "tests/swap/test_residual_vq.py",
        "tests/swap/test_check.py", "tests/swap/test_hub.py",
    ),
    "gpu": ("tests/kernels/test_gpu.py",),
}  # fmt: skip

_LONG = (
    "test_lower_levels.py", "test_cpu_sanitizers.py", "test_cuda_library.py", "test_triton_mutants.py",
    "test_cpu_mutants.py",
)  # fmt: skip


def tiers_of(path: Path) -> list[str]:
    """The tiers of all tests in this file."""
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return [tier for tier, patterns in _PATHS.items() if any(fnmatch(name, pattern) for pattern in patterns)]


def mark(items: Iterable[pytest.Item]) -> None:
    """Adds the markers of its tiers to every test. A test that is evidence is not in the cheaper tier as well."""
    for item in items:
        for tier in tiers_of(item.path):
            if tier != "emulated" or not item.get_closest_marker("evidence"):
                item.add_marker(tier)


def long_ones_first(items: list[pytest.Item]) -> None:
    """Sorts the tests that take minutes to the front. At the end, they would leave all workers but one idle.

    Among them are those of machine code, the first of which compiles the kernels of a file.
    """
    items.sort(key=lambda item: item.path.name not in _LONG and not item.name.startswith("test_machine_code"))


def is_left_out(item: pytest.Item, named: Iterable[Path]) -> bool:
    """Whether a run without options leaves out a test, which it does not if the file is among those that it names."""
    if item.path in named:
        return False
    return any(item.get_closest_marker(tier) for tier in TIERS)
