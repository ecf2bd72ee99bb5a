"""Draws the curves of training logs as one picture: the work of `python -m var plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from var_kernels.native.build import write_atomically

from ..training.progress import read_log
from ..training.trainer import LOG_NAME
from .console import say

# Values of a log that get no curve: the step, the learning rate, the norm of the gradient and the speed of the machine.
_HIDDEN = ("step", "seconds", "images/s", "tokens/s", "lr", "grad_norm")
_TITLES = {
    "loss": "loss", "mse": "squared error", "l1": "absolute error", "vq": "quantizer loss", "codes": "codes in use",
    "psnr": "PSNR, dB", "last_scale_accuracy": "accuracy, last scale",
}
_PANEL_INCHES = (4.0, 3.0)
_COLUMNS = 3
_LOG_RANGE = 5  # values that fall by more than this factor are drawn on a logarithmic axis


def run(runs: Sequence[Path], output: Path) -> None:
    """Draw the logs of `runs` (folders, or log files) into the PNG file `output`."""
    logs = {path: _read(path) for path in runs}
    figure = draw(logs)
    write_atomically(output, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    steps = ", ".join(f"{path} to step {log[-1]['step']:.0f}" for path, log in logs.items())
    say(f"{output}: {steps}")


def _read(path: Path) -> list[dict[str, float]]:
    file = path / LOG_NAME if path.is_dir() else path
    try:
        rows = [record for record in read_log(file) if isinstance(record, dict)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected the log of a training, got no text ({error})") from error
    numbers = [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in rows]
    records = [record for record in numbers if "step" in record]
    if not records:
        got = "no record in it" if file.exists() else "no such file"
        raise ValueError(f"{file}: expected the log of a training, got {got}")
    return records


def draw(logs: dict[Path, list[dict[str, float]]]) -> Any:
    """A figure with one or more rows of panels per run. A value and its validation share a panel."""
    try:
        # pyplot is not used, because it keeps figures in the process and may need a display.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f'plot needs matplotlib: pip install "var-kernels[plots]" ({error})') from error

    rows = [(path, names) for path, log in logs.items() for names in _rows(_panels(log))]
    figure = Figure(figsize=(_COLUMNS * _PANEL_INCHES[0], len(rows) * _PANEL_INCHES[1]), layout="constrained")
    axes = figure.subplots(len(rows), _COLUMNS, squeeze=False)
    for row, (path, names) in zip(axes, rows, strict=True):
        for axis in row[len(names):]:
            axis.set_axis_off()
        for axis, name in zip(row, names, strict=False):
            _draw_panel(axis, name, logs[path])
        row[0].set_ylabel(path.name if path.is_dir() else path.parent.name)
    return figure


def _rows(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[start : start + _COLUMNS] for start in range(0, len(names), _COLUMNS)]


def _panels(log: Sequence[dict[str, float]]) -> list[str]:
    """Names of the values in a log without the prefix `val_`, in order of appearance."""
    names = dict.fromkeys(name.removeprefix("val_") for record in log for name in record)
    return [name for name in names if name not in _HIDDEN]


def _draw_panel(axis: Any, name: str, log: Sequence[dict[str, float]]) -> None:
    from matplotlib.ticker import LogLocator

    values: list[float] = []
    for key, label, style in ((name, "training", "C0-"), (f"val_{name}", "held out", "C1o-")):
        points = [(record["step"], record[key]) for record in log if key in record]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1.2)
            values += [value for _, value in points]
    if values[0] > _LOG_RANGE * min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    axis.set_title(_TITLES.get(name, name), fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
