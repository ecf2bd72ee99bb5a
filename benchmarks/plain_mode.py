"""Times headline cases with plain allocation: in a process of its own that has the default settings of malloc.

``python -m benchmarks.plain_mode SECONDS THREADS MODULE TITLE [MODULE TITLE ...]`` prints one JSON object, which has
for each title the medians, the paired ratio and the page faults per call of ours and of the baseline. It checks no
results: the calling session has checked the same functions on the same inputs.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from . import fair_malloc
from .harness import OURS, Case, measure, prepare
from .table import format_seconds


def run(cases: Iterable[tuple[str, Case]], *, budget: float, threads: int) -> dict[str, dict]:
    """The results for (module, case) pairs, from a subprocess without the thresholds of fair allocation."""
    arguments = [part for module, case in cases for part in (module, case.title)]
    if not arguments:
        return {}
    command = [sys.executable, "-m", __spec__.name, str(budget), str(threads), *arguments]
    answer = subprocess.run(
        command, env=fair_malloc.plain_environment(), cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    if answer.returncode:
        raise RuntimeError(f"the plain-allocation run failed with status {answer.returncode}:\n{answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def line(result: dict, baseline: str) -> str:
    """The line of the table that shows a result."""
    ours, base = result["ours"], result["baseline"]
    return (
        f"  plain allocation: {OURS} {format_seconds(ours['median'])}, {ours['faults']:.0f} faults/call; {baseline} "
        f"{format_seconds(base['median'])}, {base['faults']:.0f} faults/call; {result['ratio']:.2f}x"
    )


def _measure(case: Case, budget: float) -> dict:
    inputs = case.inputs()
    ours, baseline = prepare(case, OURS, inputs), prepare(case, case.baseline, inputs)
    timing, own = measure(ours, baseline, budget), measure(baseline, baseline, budget / 4)
    return {
        "ours": {"median": timing.median, "faults": timing.faults},
        "baseline": {"median": own.median, "faults": own.faults},
        "ratio": timing.ratio,
    }


def main(arguments: list[str]) -> None:
    """Entry point of the subprocess."""
    budget, threads, *names = arguments
    torch.set_num_threads(int(threads))
    results = {}
    for module, title in zip(names[::2], names[1::2], strict=True):
        case = next(case for case in importlib.import_module(module).CASES if case.title == title)
        results[title] = _measure(case, float(budget))
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
