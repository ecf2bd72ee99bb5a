"""Shows the progress of a training: a bar on a terminal, plain lines elsewhere, and a JSON-lines log for curves."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from var_kernels.native.build import write_atomically


def format_duration(seconds: float) -> str:
    """`seconds` as h:mm:ss, or m:ss below one hour."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def format_metrics(record: dict[str, float]) -> str:
    """`name value` pairs with four significant digits. Values from 10,000 on are whole numbers with commas."""
    return "  ".join(f"{key} {value:,.0f}" if abs(value) >= 1e4 else f"{key} {value:.4g}"
                     for key, value in record.items())  # fmt: skip


class TrainingDisplay:
    """A context manager that shows `title` with step, metrics and time left.

    On a terminal it redraws one line; elsewhere it writes each record as a line of text to `stream` (default stderr).
    """

    def __init__(self, title: str, total: int, stream: IO[str] | None = None) -> None:
        self.title, self.total = title, total
        self._console = Console(file=stream if stream is not None else sys.stderr, highlight=False)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
            self._progress = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=self._console)
            self._task = self._progress.add_task(title, total=total, metrics="")

    def __enter__(self) -> TrainingDisplay:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def update(self, step: int, record: dict[str, float], seconds_left: float | None = None) -> None:
        """Shows the metrics at `step` and, if given, the time left at the present speed."""
        text = format_metrics(record)
        if seconds_left is not None:
            text += f"  {format_duration(seconds_left)} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, metrics=text)
        else:
            self.note(f"step {step}/{self.total}  {text}")

    def advance(self, step: int) -> None:
        """Moves the bar on a terminal. Elsewhere it prints nothing."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def note(self, message: str) -> None:
        """Prints one permanent line, which is above the bar on a terminal."""
        line = Text(f"{self.title}: {message}")
        if self._progress is not None:
            self._progress.console.print(line, soft_wrap=True)
        else:
            self._console.print(line, soft_wrap=True)


class JsonLinesLog:
    """Appends JSON objects to `path`, one a line, each flushed, so that curves can be drawn while training runs."""

    def __init__(self, path: Path, keep_until_step: int | None = None) -> None:
        """Starts an empty log, or keeps the records up to `keep_until_step`: a resumed run repeats the later ones."""
        self.path = path
        kept = [] if keep_until_step is None else [r for r in read_log(path) if r.get("step", 0) <= keep_until_step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))

    def write(self, record: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class StepMeter:
    """Measures steps per second since the last call of `rate`, and seconds since construction."""

    def __init__(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()
        self._start = self._time

    def rate(self, step: int) -> float:
        now = time.monotonic()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return max(rate, 1e-9)

    def total(self) -> float:
        return time.monotonic() - self._start


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Records of a training log. A missing file gives no records. A last line that a crash cut short is left out."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
