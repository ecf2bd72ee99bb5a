"""Which of our GPU backends is the fastest, op by op, and the file that tells later processes.

An op is ranked if all of its cases in the run were timed with each GPU backend: by the geometric mean over the cases of
the ratios to the baseline, each a median over pairs. Between two backends the baseline cancels.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from var_kernels import backends
from var_kernels.measured import speeds
from var_kernels.measured.speeds import MARGIN, Speeds

from .harness import Case, by_backend
from .table import Row


def rank(cases: Iterable[Case], rows: Mapping[str, Sequence[Row]]) -> tuple[dict[str, Speeds], dict[str, str]]:
    """The speeds of each op that was measured, and of each that has none the reason; `rows` by the cases' titles."""
    titles: dict[str, list[str]] = {}
    for case in cases:
        titles.setdefault(case.op, []).append(case.title)
    ranked, unranked = {}, {}
    for op, of_op in titles.items():
        if op not in backends.GPU_OPS or not any(title in rows for title in of_op):
            continue
        found = [row for title in of_op for row in rows.get(title, ()) if row.seconds]
        ratios = {name: [row.ratio for row in found if row.provider == by_backend(name)]
                  for name in backends.GPU_BACKENDS}  # fmt: skip
        missing = [f"{name} in {len(of_op) - len(known)} of {len(of_op)} cases"
                   for name, known in ratios.items() if len(known) < len(of_op)]  # fmt: skip
        if missing:
            unranked[op] = f"not ranked, because not timed: {', '.join(missing)}"
        else:
            ranked[op] = Speeds({name: statistics.geometric_mean(known) for name, known in ratios.items()}, len(of_op))
    return ranked, unranked


def record(ranked: Mapping[str, Speeds]) -> str:
    """Adds the speeds to the file of this GPU, and says so, or why not."""
    device = torch.cuda.get_device_name()
    try:
        known = speeds.read(device, backends.GPU_BACKENDS)
    except ValueError:  # damaged: rewritten
        known = {}
    try:
        path = speeds.write(device, known | ranked)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        return f"not recorded: {error}"
    return f'recorded in {path}: later processes on this kind of GPU follow it in "auto" until it is deleted'


def lines(ranked: Mapping[str, Speeds], unranked: Mapping[str, str]) -> Iterator[str]:
    """One line per op, below a header."""
    yield f"our GPU backends, by op: geometric mean of × over its cases; above {MARGIN:.0%} the order of auto changes"
    major = torch.cuda.get_device_capability()[0]
    for op, found in ranked.items():
        shipped = backends.shipped_choice(op, major).first
        first = found.first(shipped)
        yield f"  {op}: {found}: {first} {'stays' if first == shipped else 'comes'} first"
    for op, reason in unranked.items():
        yield f"  {op}: {reason}"
