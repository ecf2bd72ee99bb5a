"""The table at the end of a run, and the calculation of its figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .peaks import Peaks


@dataclass(frozen=True)
class Work:
    """The work of one call: `amount` of `unit` ("FLOP", "B" or "images"), and the name of the peak that limits it, if
    any.

    FLOP and bytes are those that the task needs (visible pairs only, every tensor read or written once), not those that
    a provider spends, so a higher rate always means a shorter time.
    """

    amount: float
    unit: str
    limit: str | None = None

    def __post_init__(self) -> None:
        if self.unit not in ("FLOP", "B", "images"):
            raise ValueError(f"unit: expected FLOP, B or images, got {self.unit!r}")
        if self.limit not in ("fp32", "bf16", "copy", None):
            raise ValueError(f"limit: expected fp32, bf16, copy or None, got {self.limit!r}")

    @property
    def rate_unit(self) -> str:
        return {"FLOP": "GFLOP/s", "B": "GB/s", "images": "images/s"}[self.unit]

    def rate(self, seconds: float) -> float:
        """Work per second in `rate_unit`."""
        return self.amount / seconds / (1 if self.unit == "images" else 1e9)

    def share(self, seconds: float, peaks: Peaks) -> float | None:
        """The fraction of the measured limit that was reached; None if there is no limit."""
        if self.limit is None:
            return None
        return self.rate(seconds) / peaks.get(self.limit, int(self.amount)).value


@dataclass(frozen=True)
class Row:
    """One provider's line: seconds of each round, paired ratio to the baseline, error, and page faults per call.

    A provider that was not timed has a note instead.
    """

    provider: str
    seconds: tuple[float, ...] = ()
    ratio: float | None = None
    error: float | None = None
    faults: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def iqr(self) -> float:
        """Interquartile range in seconds."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    def as_dict(self, work: Work) -> dict:
        """The figures for pytest-benchmark's JSON file."""
        known = {"ratio": self.ratio, "max_error": self.error, "faults_per_call": self.faults, "note": self.note}
        if self.seconds:
            known[work.rate_unit] = work.rate(self.median)
        return known


def format_seconds(seconds: float) -> str:
    """The time with three to four digits, in s, ms or µs."""
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.4g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _limit(work: Work, peaks: Peaks) -> str:
    if work.limit is None:
        return ""
    peak = peaks.get(work.limit, int(work.amount))
    return f"; limit {peak.value:.4g} {work.rate_unit} ({work.limit}: {peak.how})"


def case_lines(
    title: str, baseline: str, work: Work, rows: Iterable[Row], peaks: Peaks, missing: Iterable[tuple[str, str]] = ()
) -> list[str]:
    """The table of one case: a header, a line for each provider from fast to slow, then those without a time."""
    rows = [*rows, *(Row(name, note=f"not measured: {why}") for name, why in missing)]
    timed = sorted((row for row in rows if row.seconds), key=lambda row: row.median)
    width = max(len(row.provider) for row in rows)
    lines = [title, f"  × is against {baseline}{_limit(work, peaks)}"]
    if timed:
        lines.append(
            f"  {'provider':<{width}} {'median':>9} {'IQR':>6} {'×':>7} {work.rate_unit:>9} {'of limit':>8} "
            f"{'max error':>9} {'faults':>7}"
        )
    for row in timed:
        share = work.share(row.median, peaks)
        lines.append(
            f"  {row.provider:<{width}} {format_seconds(row.median):>9} {row.iqr / row.median:>6.1%} "
            f"{row.ratio:>6.2f}x {work.rate(row.median):>9.4g} {'-' if share is None else format(share, '.0%'):>8} "
            f"{row.error:>9.1e} {row.faults:>7.0f}"
        )
    lines += [f"  {row.provider:<{width}} {row.note}" for row in rows if not row.seconds]
    return lines
