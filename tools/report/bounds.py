"""Lower bounds of time that follow from published peaks. They are static bounds, not measurements; how near a kernel
comes to them is not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from var_kernels.triton.problems import Problem
from var_kernels.triton.targets import TARGETS

from .cards import CARDS

_PARTITIONS = 4  # of a multiprocessor; each issues one instruction a clock


@dataclass(frozen=True)
class Bound:
    """The least time in seconds that a problem takes on a card. `limit` names the resource that takes this time."""

    seconds: float
    limit: str


def problem_bound(problem: Problem, target: str) -> Bound:
    """The bound if each tensor is moved once at full bandwidth and, at the same time, what is visible is computed at
    peak."""
    card = CARDS[target]
    peak = card.peak_16bit if problem.tensor_cores else card.peak_fp32
    times = {"memory": problem.bytes / card.bandwidth, "arithmetic": problem.operations / peak}
    if card.exp_rate is not None:
        rate = card.exp_rate * TARGETS[target].multiprocessors * card.clock
        times["exp"] = problem.exponentials / rate
    limit = max(times, key=times.__getitem__)
    return Bound(times[limit], limit)


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel: one iteration of one warp, with all paths through its body.

    `cycles` are the cycles of each pipe in one of the four partitions of a multiprocessor. `limit` is the pipe with the
    most cycles. Latency, stalls and bank conflicts are not included. `tensor_ceiling` is the largest share of the time
    that the tensor cores can be busy; None if the loop does not use them or their rate is not published.
    """

    counts: Mapping[str, int]
    cycles: Mapping[str, float]
    limit: str
    tensor_ceiling: float | None


def loop_bound(
    target: str, counts: Mapping[str, int], tensor_work: Iterable[tuple[str, int] | None]
) -> Loop:
    """`tensor_work` has an entry per tensor-core instruction: the name of its rate and its FLOP, or None if not
    known."""
    card = CARDS[target]
    is_cuda = TARGETS[target].api == "cuda"
    # On AMD a wave of 64 lanes takes 4 cycles of a SIMD of 16 lanes, for every vector instruction.
    cycles = {"issue": float(counts["instructions"])} if is_cuda else {}
    lanes = 32 if is_cuda else 64
    cycles["fp32" if is_cuda else "vector"] = (
        counts["fp32" if is_cuda else "vector"] * lanes / (card.fp32_rate / _PARTITIONS)
    )
    if card.exp_rate is not None:
        cycles["exp"] = counts["exp"] * lanes / (card.exp_rate / _PARTITIONS)
    work = list(tensor_work)
    costed = bool(work) and all(entry is not None and entry[0] in card.tensor_rates for entry in work)
    if costed:
        cycles["tensor"] = sum(flop / (card.tensor_rates[rate] / _PARTITIONS) for rate, flop in work)
    limit = max(cycles, key=cycles.__getitem__)
    if work and not costed:
        limit = "not known"
    return Loop(dict(counts), cycles, limit, cycles["tensor"] / max(cycles.values()) if costed else None)
