"""Planted faults: modules of a .cu file with one line of it, or of what it includes, made wrong.

    @pytest.mark.evidence
    @pytest.mark.parametrize("name", MUTANTS)
    def test_planted_faults_are_found(name, selected):
        emulation = load_mutant(SOURCE, MUTANTS[name], [MUTANTS[each] for each in selected("name")])
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from var_kernels.native import build as native_build

from . import Emulation, build, load_built

__all__ = ["Mutant", "load_mutant"]

_JOBS = 2  # compilations at a time
# The others are seen in results and counters, or stop the fast variant.
_RACE_LAYERS = ("race", "cross_block_race", "undefined", "in_flight", "out_of_bounds")


@dataclass(frozen=True)
class Mutant:
    """In `file` of csrc/cuda `old`, which stands there `times`, becomes `new`; `layer` must find it.

    `layer`: the kind of a report (see `Report`), or a name that the test gives to what it looks at, such as "values".
    """

    file: str
    old: str
    new: str
    layer: str
    times: int = 1

    @property
    def variant(self) -> str:
        """The quickest build that can find it."""
        return "race" if self.layer in _RACE_LAYERS else "fast"

    @property
    def label(self) -> str:
        return "mutant_" + hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    def plant(self, folder: Path) -> Path:
        """The folder of the CUDA files in a copy of the sources with the fault.

        ValueError if `old` does not stand there `times`.
        """
        shutil.copytree(native_build.CSRC, folder / "csrc")
        path = folder / "csrc" / "cuda" / self.file
        text = path.read_text()
        if (found := text.count(self.old)) != self.times:
            raise ValueError(f"{self.file}: expected {self.times} times {self.old!r}, got {found}")
        path.write_text(text.replace(self.old, self.new))
        return path.parent


@functools.cache
def _build_mutant(source: Path, mutant: Mutant) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        return build.build(mutant.variant, [mutant.plant(Path(folder)) / source.name], mutant.label)


def load_mutant(source: Path, mutant: Mutant, together: Iterable[Mutant] = ()) -> Emulation:
    """The module of `source` with the fault of `mutant`; all of `together`, which the run needs too, are built, two at
    a time."""
    with ThreadPoolExecutor(_JOBS) as pool:
        list(pool.map(functools.partial(_build_mutant, source), together))
    return load_built(_build_mutant(source, mutant), build.namespace(mutant.variant, mutant.label))
