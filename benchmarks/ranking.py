"""Ranks our GPU backends op by op, and writes the ranking to the file that later processes read.

An op is ranked if all of its cases in the run were timed with each GPU backend. Its backends are ranked by the
geometric mean, over the cases, of the ratios to the baseline, each of which is a median over pairs. In a comparison of
two backends the baseline cancels.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from var_kernels import backends
from var_kernels.measured import device_file, speeds
from var_kernels.measured.speeds import MARGIN, Speeds

from .harness import Case, by_backend
from .table import Row


def rank(cases: Iterable[Case], rows: Mapping[str, Sequence[Row]]) -> tuple[dict[str, Speeds], dict[str, str]]:
    """The speeds of each op that is ranked, and for each other op that was measured the reason why it is not.

    `rows` has the rows of each case by its title.
    """
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
    """Adds the speeds to the file of this GPU. Returns a sentence that says so, or why it was not possible."""
    device = torch.cuda.get_device_name()
    try:
        with device_file.only_measuring("backends", device):
            try:
                known = speeds.read(device, backends.GPU_BACKENDS)
            except ValueError:  # the file is damaged and will be replaced
                known = {}
            path = speeds.write(device, known | ranked)
    except OSError as error:
        return f"not recorded: {error}"
    return f'recorded in {path}: later processes on this kind of GPU follow it in "auto" until it is deleted'


def lines(ranked: Mapping[str, Speeds], unranked: Mapping[str, str]) -> Iterator[str]:
    """The lines of the report: a header, then one line for each op."""
    yield f"our GPU backends, by op: geometric mean of × over its cases; above {MARGIN:.0%} the order of auto changes"
    major = torch.cuda.get_device_capability()[0]
    for op, found in ranked.items():
        shipped = backends.shipped_choice(op, major).first
        first = found.first(shipped)
        yield f"  {op}: {found}: {first} {'stays' if first == shipped else 'comes'} first"
    for op, reason in unranked.items():
        yield f"  {op}: {reason}"
