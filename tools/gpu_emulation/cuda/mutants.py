"""Planted faults in the CUDA kernels: builds a .cu file with one wrong line, in the file or in one that it includes.

    def steps(emulation, looked_for):
        yield lambda: check(inputs, emulation, seed=1)

    @pytest.mark.parametrize("name", parameters(MUTANTS, others=pytest.mark.evidence))
    def test_planted_faults_are_found(name, selected):
        assert_found(SOURCE, MUTANTS, name, steps, selected("name"))

    @pytest.mark.evidence
    def test_nothing_is_found_without_a_fault():
        assert_nothing_found(SOURCE, MUTANTS, steps)
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.gpu_emulation.planted_faults import Mutant, parameters
from var_kernels.native import build as native_build

from . import Emulation, EmulationError, build, load, load_built

__all__ = ["Mutant", "assert_found", "assert_nothing_found", "findings", "load_mutant", "parameters"]

_JOBS = 2  # compilations at a time
# The variant race finds these. The others show in results and counters, or stop the fast variant.
_RACE_LAYERS = ("race", "cross_block_race", "undefined", "in_flight", "out_of_bounds")
# The element types, as `with_dtype` in launch.h writes them.
DTYPES = ("float", "bf16", "fp16")

# The steps that a test runs in a module, to find what a mutant's `check` names.
Steps = Callable[[Emulation, str], Iterable[Callable[[], object]]]


def _variant(check: str) -> str:
    return "race" if check in _RACE_LAYERS else "fast"


def narrow(folder: Path, dtypes: Iterable[str]) -> None:
    """Changes a copy of the CUDA files such that only these element types are compiled. Others raise RuntimeError."""
    path = folder / "launch.h"
    text = path.read_text(encoding="utf-8")
    for dtype in DTYPES:
        call = f"return f({dtype}());"
        if text.count(call) != 1:
            raise ValueError(f"launch.h: expected {call!r} once, got {text.count(call)} times")
        if dtype not in dtypes:
            text = text.replace(call, f'STD_TORCH_CHECK(false, "{dtype} is not compiled");')
    path.write_text(text, encoding="utf-8")


@functools.cache
def _build_mutant(source: Path, dtypes: tuple[str, ...], mutant: Mutant) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        cuda = Path(shutil.copytree(native_build.CSRC, Path(folder) / "csrc")) / "cuda"
        narrow(cuda, dtypes)
        with mutant.planted(cuda):
            # The kernels run a few times only, so they are compiled without optimisation.
            return build.build(f"{_variant(mutant.check)} quick", [cuda / source.name])


def load_mutant(
    source: Path, mutant: Mutant, together: Iterable[Mutant] = (), dtypes: tuple[str, ...] = DTYPES
) -> Emulation:
    """The module of `source` with the fault of `mutant`. It also builds all of `together`, which the run needs as well,
    two at a time. `dtypes`: the element types that are compiled."""
    with ThreadPoolExecutor(_JOBS) as pool:
        list(pool.map(functools.partial(_build_mutant, source, dtypes), together))
    return load_built(_build_mutant(source, dtypes, mutant))


def findings(steps: Iterable[Callable[[], object]]) -> set[str]:
    """Runs all steps and returns what they find: kinds of reports (see `Report`), "values" if an assertion fails, and
    the strings of a set that a step returns."""
    found: set[str] = set()
    for step in steps:
        try:
            answer = step()
        except EmulationError as error:
            found |= {report.kind for report in error.reports}
        except AssertionError:
            found.add("values")
        else:
            found |= answer if isinstance(answer, set) else set()
    return found


def assert_found(
    source: Path, mutants: Mapping[str, Mutant], name: str, steps: Steps, names: Iterable[str],
    dtypes: tuple[str, ...] = DTYPES,
) -> None:  # fmt: skip
    """Asserts that the steps find the fault `name` of `source` by its `check`. `names`: the faults that this run
    plants."""
    mutant = mutants[name]
    emulation = load_mutant(source, mutant, [mutants[each] for each in names if each in mutants], dtypes)
    found = findings(steps(emulation, mutant.check))
    assert mutant.check in found, f"{name}: expected {mutant.check}, found {sorted(found) or 'nothing'}"


def assert_nothing_found(source: Path, mutants: Mapping[str, Mutant], steps: Steps) -> None:
    """Asserts that the steps find nothing in the file without a fault."""
    for check in sorted({mutant.check for mutant in mutants.values()}):
        found = findings(steps(load(_variant(check), [source]), check))
        assert not found, f"looking for {check}: found {sorted(found)} without a fault"
