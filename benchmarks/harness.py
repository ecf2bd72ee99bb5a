"""Cases as data, and the one way in which each is judged and timed.

A :class:`Case` names inputs, providers, the judge of their results, and the work to be done. ``conftest.py`` makes one
test of every pair of case and provider, the providers of a case one after another. Each test judges first and times
after: a wrong result is a failed test without a time. Every timed round runs the case's baseline and then the provider,
so whatever else the machine does hits both, and the ratio is the median of the ratios of these pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from var_kernels import backends
from var_kernels.testing import assert_accurate, max_error

from . import fair_malloc
from .clock import Clock, CpuClock
from .table import Row, Work

OURS = "var_kernels"
TIERS = ("smoke", "quick", "full")

Call = Callable[[], Any]
Provider = Callable[[Any], Call]  # the case's inputs -> the function to be timed
Judge = Callable[..., float]  # judge(result, peer=False) -> its largest error; AssertionError if it is wrong

# A sum of n terms, one after another, is off by about sqrt(n) roundings, where eager's sums by halves are off by
# sqrt(log2(n)): eight times less for the 680 tokens over which gradients are summed. A peer that sums naively is less
# accurate, as its row shows, but not wrong; wrong results are off by orders of magnitude more.
PEER_SLACK = 8


class Unavailable(Exception):
    """Why a provider cannot run here; becomes its row in the table."""


@dataclass(frozen=True)
class Case:
    """One piece of work that several providers do.

    `tier` is the smallest run that includes the case ("smoke" cases belong to ``--smoke`` alone). `op` is the one whose
    GPU backends the case compares ("": it is not about one op). `inputs` makes the
    inputs, once, on the CPU; `judge`, given them, makes the judge of results. `missing` says why a known peer is no
    provider. `devices` are those on which it is worth its time.
    """

    group: str
    name: str
    tier: str
    inputs: Callable[[], Any]
    providers: Mapping[str, Provider]
    baseline: str
    judge: Callable[[Any], Judge]
    work: Work
    headline: bool = False
    missing: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu",)
    op: str = ""

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ValueError(f"tier: expected one of {', '.join(TIERS)}, got {self.tier!r}")
        if self.baseline not in self.providers:
            raise ValueError(f"baseline: expected one of {', '.join(self.providers)}, got {self.baseline!r}")

    @property
    def title(self) -> str:
        return f"{self.group}, {self.name}"

    def runs_in(self, tier: str, device: str = "cpu") -> bool:
        """Whether a run of `tier` on `device` includes this case: the full run has the quick cases as well."""
        return device in self.devices and (self.tier == tier or (tier == "full" and self.tier == "quick"))

    def providers_on(self, device: str) -> list[str]:
        """The providers that exist on `device`, by name."""
        return [name for name, provider in self.providers.items() if getattr(provider, "device", device) == device]


def compiled(provider: Provider) -> Provider:
    """Marks a provider that compiles at its first call, which ``--smoke`` leaves out."""
    provider.compiles = True
    return provider


def only_on(device: str) -> Callable[[Provider], Provider]:
    """Marks a provider that exists on one device only."""

    def mark(provider: Provider) -> Provider:
        provider.device = device
        return provider

    return mark


def kernel_backend(op: str, device: str | torch.device) -> str:
    """The backend that "auto" takes for `op` on `device`; Unavailable where that is the reference, which is never timed
    under our name."""
    reasons = []
    device_type = torch.device(device).type
    for name in backends.auto_order(op, device_type):
        reason = backends.unavailable_reason(name, device_type, op)
        if reason is None and name != "reference":
            return name
        if reason is not None:
            reasons.append(f"{name}: {reason}")
    raise Unavailable("; ".join(reasons))


def by_backend(backend: str) -> str:
    """The name of our provider that runs one GPU backend, whatever "auto" takes."""
    return f"{OURS} ({backend})"


OUR_PROVIDERS = (OURS, *map(by_backend, backends.GPU_BACKENDS))


def our_providers(ours: Callable[[Any, str], Call], *ops: str) -> dict[str, Provider]:
    """`ours(inputs, backend)` as providers: what "auto" takes for these ops and, on a GPU, each backend by name."""

    def auto(inputs):
        (device,) = {leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)}
        for op in ops:
            kernel_backend(op, device)
        return ours(inputs, "auto")

    def named(backend: str) -> Provider:
        def provider(inputs):
            for op in ops:
                if (reason := backends.unavailable_reason(backend, "cuda", op)) is not None:
                    raise Unavailable(reason)
            return ours(inputs, backend)

        return only_on("cuda")(provider)

    return {OURS: auto, **{by_backend(backend): named(backend) for backend in backends.GPU_BACKENDS}}


def judge_floats(exact: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor]) -> Judge:
    """Judges a tuple of tensors, named as in `exact` (float64), by the error of plain PyTorch's in the same dtype.

    `plain` is computed inside :func:`var_kernels.testing.stated_order`, so that a host's libraries set no bound.
    Our kernels by :func:`var_kernels.testing.assert_accurate` as it is, peers with :data:`PEER_SLACK` times that error.
    """

    def judge(results, peer: bool = False) -> float:
        results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
        if len(results) != len(exact):
            raise AssertionError(f"expected the results {', '.join(exact)}, got {len(results)} of them")
        for (name, reference), result in zip(exact.items(), results, strict=True):
            yardstick = plain[name]
            if peer:
                yardstick = (reference + PEER_SLACK * (yardstick.double() - reference)).to(yardstick.dtype)
            assert_accurate(result, yardstick, reference, name=name)
        return max(max_error(result, reference) for result, reference in zip(results, exact.values(), strict=True))

    return judge


def plain_part(exact: torch.Tensor, part: torch.Tensor, *index: slice) -> torch.Tensor:
    """A yardstick of which only `part`, at `index`, was computed; the rest is `exact`, rounded.

    Its largest error is that of the part. All elements of a result are judged by it, but the stated order, at two
    billion products a second, need not sum all of them: a judge must not take longer than what it judges. Not for
    results in some rows of which everything cancels: what is no part would have a bound there.
    """
    whole = exact.to(part.dtype)
    whole[index] = part.to(whole.device)
    return whole


def prepare(case: Case, provider: str, inputs: Any, *, smoke: bool = False) -> Call:
    """The provider's function; Unavailable with the reason where it cannot run."""
    if smoke and getattr(case.providers[provider], "compiles", False):
        raise Unavailable("compiles at its first call: left out of --smoke")
    try:
        return case.providers[provider](inputs)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error


def first_result(case: Case, provider: str, call: Call) -> Any:
    """The result to be judged. A peer that cannot do this case says why; our own failure is a failure."""
    try:
        return call()
    except Unavailable:
        raise
    except Exception as error:
        if provider in (*OUR_PROVIDERS, case.baseline):
            raise
        message = " ".join(str(error).split()) or "no message"
        raise Unavailable(f"{type(error).__name__}: {message[:160]}") from error


@dataclass(frozen=True)
class Timing:
    """Seconds of every round, of the provider and of the baseline that ran just before it, and page faults per call."""

    seconds: tuple[float, ...]
    baseline: tuple[float, ...]
    faults: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        return statistics.median(base / own for base, own in zip(self.baseline, self.seconds, strict=True))


def rounds_for(seconds_per_round: float, budget: float) -> int:
    """As many rounds as fit the budget, at most 300, and at least 7: the median of fewer is noise.

    Of calls that take seconds 3 do: what disturbs a machine for milliseconds is averaged within each.
    """
    return max(7 if seconds_per_round < 2 else 3, min(300, int(budget / max(seconds_per_round, 1e-9))))


def measure(call: Call, baseline: Call, budget: float) -> Timing:
    """Interleaved rounds, baseline then provider, for about `budget` seconds, after two rounds of warm-up."""
    seconds = CpuClock().seconds
    warm = [seconds(baseline) + seconds(call) for _ in range(2)]
    pairs = [(seconds(baseline), seconds(call)) for _ in range(rounds_for(min(warm), budget))]
    own, base = tuple(pair[1] for pair in pairs), tuple(pair[0] for pair in pairs)
    return Timing(own, base, fair_malloc.faults_per_call(call))


def measure_with(benchmark, call: Call, baseline: Call, budget: float, clock: Clock) -> Timing | None:
    """The same rounds, the provider's part timed and recorded by pytest-benchmark; None where it may not time.

    On a GPU pytest-benchmark records what the host saw, and the clock's figures count.
    """
    if benchmark.disabled:
        benchmark.pedantic(call)
        return None
    warm = [clock.seconds(baseline) + clock.seconds(call) for _ in range(2)]
    base: list[float] = []
    own: list[float] = []
    timed = call if clock.device == "cpu" else lambda: own.append(clock.seconds(call))
    benchmark.pedantic(
        timed, setup=lambda: base.append(clock.seconds(baseline)), rounds=rounds_for(min(warm), budget), iterations=1
    )
    return Timing(tuple(own or benchmark.stats.stats.data), tuple(base), fair_malloc.faults_per_call(call))


class Duel:
    """Judges and times one provider after the other; keeps what the providers of one case share."""

    def __init__(self, *, tier: str, budget: float, clock: Clock | None = None) -> None:
        self.tier = tier
        self.clock = CpuClock() if clock is None else clock
        self.budget = budget
        self.rows: dict[str, list[Row]] = {}
        self.cases: dict[str, Case] = {}
        self._title: str | None = None

    def _load(self, case: Case) -> None:
        if self._title == case.title:
            return
        self._title, self._inputs, self._judge, self._baseline = None, None, None, None  # free the last case first
        self._inputs = self.clock.place(case.inputs())
        self._judge = case.judge(self._inputs)
        self._baseline = prepare(case, case.baseline, self._inputs)
        self._title = case.title

    def run(self, case: Case, provider: str, benchmark) -> Row:
        """The row of `provider`. Raises AssertionError for a wrong result, before any timing, and Unavailable."""
        self.cases[case.title] = case
        rows = self.rows.setdefault(case.title, [])
        benchmark.group = case.title
        benchmark.extra_info.update(provider=provider, baseline=case.baseline)
        try:
            self._load(case)
            call = prepare(case, provider, self._inputs, smoke=self.tier == "smoke")
            error = self._judge(first_result(case, provider, call), peer=provider not in OUR_PROVIDERS)
        except Unavailable as reason:
            rows.append(Row(provider, note=f"not measured: {reason}"))
            raise
        except Exception as error:
            verdict = "wrong result" if isinstance(error, AssertionError) else type(error).__name__
            rows.append(Row(provider, note=f"REFUSED, {verdict}: {_first_line(error)}"))
            raise
        timing = measure_with(benchmark, call, self._baseline, self.budget, self.clock)
        if timing is None:
            row = Row(provider, error=error, note="judged right; not timed")
        else:
            row = Row(provider, timing.seconds, timing.ratio, error, timing.faults)
        rows.append(row)
        benchmark.extra_info.update(row.as_dict(case.work))
        return row


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:160]
