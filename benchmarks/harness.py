"""Cases as data, and the one way in which every case is checked and timed.

A :class:`Case` names inputs, providers, the judge of their results, and the work to be done. A provider is one
implementation of that work; a judge is a function that compares a result with float64 and raises AssertionError if it
is wrong. ``plugin.py`` makes one test for every pair of case and provider, with the providers of a case one after
another. Each test first checks the result and then times: a wrong result is a failed test without a time. Every timed
round runs the case's baseline and then the provider, so whatever else the machine does affects both, and the ratio is
the median of the ratios of these pairs.
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
Provider = Callable[[Any], Call]  # takes the inputs of the case and returns the function to be timed
Judge = Callable[..., float]  # judge(result, peer=False) returns the largest error; AssertionError if it is too large

# A sum of n terms, one after another, is off by about sqrt(n) roundings. Eager PyTorch sums by halves, which is off by
# sqrt(log2(n)): eight times less for the 680 tokens over which gradients are summed. A peer that sums one term after
# another is less accurate, as its row shows, but not wrong; wrong results are off by orders of magnitude more.
PEER_SLACK = 8


class Unavailable(Exception):
    """A provider cannot run here. The message says why, and becomes its row in the table."""


@dataclass(frozen=True)
class Case:
    """One piece of work that several providers do.

    `tier` is the smallest run that includes the case ("smoke" cases belong to ``--smoke`` alone). `inputs` makes the
    inputs, once, on the CPU. `providers` maps names to providers, and `baseline` is the name of the one to which ratios
    refer. `judge` takes the inputs and returns the judge of results. `headline` cases are measured again without fair
    allocation. `missing` says why a known peer is no provider. `devices` are those for which the case has a useful
    size. `op` is the one whose GPU backends the case compares; it is empty if the case is not about one op.
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
        """Whether a run of `tier` on `device` includes this case. The full run includes the quick cases."""
        return device in self.devices and (self.tier == tier or (tier == "full" and self.tier == "quick"))

    def providers_on(self, device: str) -> list[str]:
        """The names of the providers that exist on `device`."""
        return [name for name, provider in self.providers.items() if getattr(provider, "device", device) == device]


def compiled(provider: Provider) -> Provider:
    """Marks a provider that compiles at its first call; ``--smoke`` leaves it out."""
    provider.compiles = True
    return provider


def only_on(device: str) -> Callable[[Provider], Provider]:
    """Marks a provider that exists on one device only."""

    def mark(provider: Provider) -> Provider:
        provider.device = device
        return provider

    return mark


def kernel_backend(op: str, device: str | torch.device) -> str:
    """The backend that "auto" takes for `op` on `device`.

    Raises Unavailable if that is the reference, which is never timed under our name.
    """
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
    """The name of our provider for one GPU backend, independent of what "auto" takes."""
    return f"{OURS} ({backend})"


OUR_PROVIDERS = (OURS, *map(by_backend, backends.GPU_BACKENDS))


def our_providers(ours: Callable[[Any, str], Call], *ops: str) -> dict[str, Provider]:
    """Providers that call `ours(inputs, backend)`: one for "auto" and, on a GPU, one for each backend by name.

    `ops` are the ops that must have a kernel.
    """

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
    """A judge that compares a tuple of tensors, named as in `exact`, with those of float64.

    `plain` has the results of plain PyTorch in the same dtype, whose error sets the bound. They are computed inside
    :func:`var_kernels.testing.stated_order`, so that the bound does not depend on the libraries of the host. Results of
    our kernels must pass :func:`var_kernels.testing.assert_accurate`. For peers the error of plain PyTorch counts
    :data:`PEER_SLACK` times.
    """

    def judge(results, peer: bool = False) -> float:
        results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
        if len(results) != len(exact):
            raise AssertionError(f"expected the results {', '.join(exact)}, got {len(results)} of them")
        for (name, reference), result in zip(exact.items(), results, strict=True):
            same_dtype = plain[name]
            if peer:
                same_dtype = (reference + PEER_SLACK * (same_dtype.double() - reference)).to(same_dtype.dtype)
            assert_accurate(result, same_dtype, reference, name=name)
        return max(max_error(result, reference) for result, reference in zip(results, exact.values(), strict=True))

    return judge


def plain_part(exact: torch.Tensor, part: torch.Tensor, *index: slice) -> torch.Tensor:
    """A plain result of which only `part`, at `index`, was computed; the rest is `exact`, rounded.

    Its largest error is that of the part, and it sets the bound for all elements of a result. The stated order computes
    two billion products a second, and the check must not take longer than the work that it checks. This does not suit
    results with rows in which everything cancels: outside of the part such rows would get a bound that they cannot
    keep.
    """
    whole = exact.to(part.dtype)
    whole[index] = part.to(whole.device)
    return whole


def prepare(case: Case, provider: str, inputs: Any, *, smoke: bool = False) -> Call:
    """The provider's function. Raises Unavailable with the reason if the provider cannot run."""
    if smoke and getattr(case.providers[provider], "compiles", False):
        raise Unavailable("compiles at its first call: left out of --smoke")
    try:
        return case.providers[provider](inputs)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error


def first_result(case: Case, provider: str, call: Call) -> Any:
    """The result of the first call, which is then checked.

    If a peer fails, it cannot do this case, and Unavailable says why. A failure of ours or of the baseline is an error.
    """
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
    """The seconds of every round, for the provider and for the baseline before it, and page faults per call."""

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
    """The number of rounds that fit the budget in seconds: at most 300, and at least 7, because the median of fewer is
    noise.

    For rounds of 2 seconds or more, 3 are enough: disturbances of milliseconds average out within each call.
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
    """The same rounds, with the provider's part timed and recorded by pytest-benchmark; None if that is disabled.

    On a GPU pytest-benchmark records the time of the host, and the figures of `clock` count.
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
    """Checks and times one provider after another, and keeps what the providers of one case share."""

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
            row = Row(provider, error=error, note="the result is right; not timed")
        else:
            row = Row(provider, timing.seconds, timing.ratio, error, timing.faults)
        rows.append(row)
        benchmark.extra_info.update(row.as_dict(case.work))
        return row


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:160]
