"""Planted faults, of CUDA and Triton kernels alike: a line of a kernel made wrong, and the check that must fail then.

    @pytest.mark.parametrize("name", parameters(FAULTS, representative=(), others=pytest.mark.evidence))

For each kernel one fault is `representative`: a run that has little time plants that one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Mutant:
    """In `file` of the runner's folder `old`, which stands there `times`, becomes `new`; then `check` must fail.

    `check`: for CUDA a finding (`cuda_emulation.mutants.findings`), for Triton a test, "file.py::function".
    """

    file: str
    old: str
    new: str
    check: str
    times: int = 1
    representative: bool = False

    @contextlib.contextmanager
    def planted(self, folder: Path) -> Iterator[None]:
        """Inside, the file in `folder` has the fault. ValueError if `old` does not stand there `times`."""
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
    """The names as parameters of a test, those of representative faults and the others with these marks.

    ValueError if none is representative: a run of these only would then say nothing about the kernel.
    """
    if not any(mutant.representative for mutant in mutants.values()):
        raise ValueError(f"mutants: expected a representative one, got none among {', '.join(mutants)}")
    return [
        pytest.param(name, marks=representative if mutant.representative else others, id=name.replace(" ", "-"))
        for name, mutant in mutants.items()
    ]
