"""Planted faults in CUDA and Triton kernels. A planted fault is a deliberate error in one line of a kernel; a named
check must then fail, which shows that the check works.

    @pytest.mark.parametrize("name", parameters(FAULTS, representative=(), others=pytest.mark.evidence))

One fault of each kernel is `representative`: a run that has little time plants that one only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Mutant:
    """Replaces `old`, which occurs `times` times in `file` (a path in the runner's folder), by `new`. Then `check` must
    fail.

    `check` is a finding of `cuda.mutants.findings` for CUDA, and a test, "file.py::function", for Triton.
    """

    file: str
    old: str
    new: str
    check: str
    times: int = 1
    representative: bool = False

    @contextlib.contextmanager
    def planted(self, folder: Path) -> Iterator[None]:
        """Inside this context, the file in `folder` has the fault. ValueError if `old` does not occur `times` times."""
        path = folder / self.file
        text = path.read_text(encoding="utf-8")
        if (found := text.count(self.old)) != self.times:
            raise ValueError(f"{self.file}: expected {self.times} times {self.old!r}, got {found}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")


Marks = pytest.MarkDecorator | Iterable[pytest.MarkDecorator]


def parameters(mutants: Mapping[str, Mutant], *, representative: Marks = (), others: Marks = ()) -> list:
    """The names as parameters of a test. Representative faults get the marks `representative`, the others `others`.

    ValueError if none is representative, because a run of representative faults would then not check the kernel at all.
    """
    if not any(mutant.representative for mutant in mutants.values()):
        raise ValueError(f"mutants: expected a representative one, got none among {', '.join(mutants)}")
    return [
        pytest.param(name, marks=representative if mutant.representative else others, id=name.replace(" ", "-"))
        for name, mutant in mutants.items()
    ]
