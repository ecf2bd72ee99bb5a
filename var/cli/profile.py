"""Measures where the time of a generation goes, by stage and scale: the work of `python -m var profile`."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from var_kernels.inference.winograd_conv import SCHEMES
from var_kernels.native.build import write_atomically

from ..generation import memory
from ..generation.batches import Sampling, default_batch_size, image_seeds, sampling_for
from ..generation.generator import Generator
from ..generation.request import PRECISIONS
from ..model.config import PRESETS
from ..model.opening import EMBEDDED, Pipeline, open_model
from ..model.transformer import VAR
from ..model.vqvae import VQVAE
from .console import check_precision, console, progress, say

# Parts of the operators' names, for each stage of the transformer. What runs after the last scale is the decoder.
_STAGES = {
    "projections": ("linear",),
    "attention": ("_block_causal_attention",),
    "AdaLN and gates": ("_adaln_layer_norm", "_gated_residual_adaln"),
    "q/k norm, KV cache": ("_qk_norm_cache",),
    "sampling": ("_sample_tokens", "uniform_", "log1p_", "exponential_"),
    "next input": ("_next_scale_input", "embedding"),
}
_CONVOLUTIONS, _NORMS = "convolutions", "GroupNorm, SiLU"
_DECODER_STAGES = {_CONVOLUTIONS: ("conv2d", "_winograd_conv"), _NORMS: ("group_norm", "silu")}
_REST = "rest"  # smaller operators, and the time of Python
_DECODER = "decoder"
_ROUNDS = 3


class Profile(NamedTuple):
    """Seconds for each row (the scales, then the decoder) and stage, and operations for each stage."""

    rows: tuple[str, ...]
    stages: tuple[str, ...]
    seconds: dict[str, dict[str, float]]
    operations: dict[str, float]  # for the whole batch; stages that are not counted are missing
    images: int

    @property
    def total(self) -> float:
        return sum(sum(row.values()) for row in self.seconds.values())


class _Timer(TorchDispatchMode):
    """Adds up the time of the operators for each stage of the current row, and their operations for each stage."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.row = ""
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.operations: dict[str, float] = defaultdict(float)
        self._synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._synchronize()
        started = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        self._synchronize()
        stage = _stage_of(function._schema.name.partition("::")[2], self.row == _DECODER)
        if stage is not None:
            self.seconds[self.row][stage] += time.perf_counter() - started
            self.operations[stage] += _operations(function._schema.name, args)
        return result


def _stage_of(operator: str, in_decoder: bool) -> str | None:
    stages = _DECODER_STAGES if in_decoder else _STAGES
    return next((stage for stage, names in stages.items() if any(name in operator for name in names)), None)


def _operations(operator: str, args: tuple) -> float:
    """The number of multiplications and additions that an operator carries out, 0 for the small operators.

    For attention these are the ones of visible pairs, for minimal filtering the ones of the matrix products.
    """
    if "_packed_linear" in operator:
        x, out_features = args[0], args[3]
        return 2.0 * x.numel() * out_features
    if "linear" in operator:
        x, weight = args[:2]
        return 2.0 * x.numel() * weight.shape[0]
    if "_block_causal_attention" in operator:
        q, k = args[0], args[1]
        return 4.0 * q.numel() * k.shape[2]
    if "conv2d" in operator:
        # Every tap is multiplied with every pixel of the input, because no convolution of the decoder has a stride.
        x, weight = args[:2]
        return 2.0 * weight.numel() * x.numel() / x.shape[1]
    if "_winograd_conv" in operator:
        x, scheme, y = args[0], SCHEMES[args[4]], args[5]
        return 2.0 * x.numel() * y.shape[-1] * scheme.products_per_input
    return 0.0


def _random_pipeline(model: str, device: str, backend: str) -> Pipeline:
    """A model with a released configuration and random weights, because times do not depend on the weights."""
    vqvae_config, var_config = PRESETS[model]
    with torch.device(device):
        vqvae, transformer = VQVAE(vqvae_config, backend), VAR(var_config, backend)
    return Pipeline(vqvae.eval(), transformer.eval())


def measure(pipeline: Pipeline, sampling: Sampling, batch: int, precision: str, rounds: int = _ROUNDS) -> Profile:
    """Times of one generation of `batch` images: the medians of `rounds` rounds, after one that warms up.

    Whole rows are timed in generations of their own, because the timer of operators slows Python down. The rest of a
    row is its time without that of its operators.
    """
    device = pipeline.var.pos_1LC.device
    memory.check_batch(
        pipeline.var.config, pipeline.vqvae.config, batch, PRECISIONS[precision].itemsize, device, pipeline.var.backend
    )
    generator = Generator(pipeline.var, pipeline.vqvae, batch_size=batch, precision=precision, graphs=False)
    schedule, classes = pipeline.var.config.schedule, pipeline.var.config.num_classes
    labels, seeds = torch.arange(batch, device=device) % classes, image_seeds(0, range(batch))
    names = [f"{side}×{side}" for side in schedule.patch_nums]
    rows, options = (*names, _DECODER), {"seeds": seeds, **dataclasses.asdict(sampling)}

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed() -> list[float]:
        marks = [time.perf_counter()]

        def mark(k: int, partial: Any) -> None:
            synchronize()
            marks.append(time.perf_counter())

        generator(labels, on_scale=mark, **options)
        synchronize()
        marks.append(time.perf_counter())
        return [end - begin for begin, end in zip(marks, marks[1:], strict=False)]

    whole, timers = [], []
    with progress("profiling", 1 + 2 * rounds) as advance:
        timed()
        advance()
        for _ in range(rounds):  # alternating, so that both run under the same conditions of the machine
            whole.append(timed())
            advance()
            with _Timer(device) as timer:
                timer.row = rows[0]

                def following(k: int, partial: Any, timer: _Timer = timer) -> None:
                    timer.row = rows[k + 1]

                generator(labels, on_scale=following, **options)
            timers.append(timer)
            advance()
    stages = (*_STAGES, *_DECODER_STAGES, _REST)
    seconds = {}
    for i, row in enumerate(rows):
        by_stage = {stage: statistics.median(timer.seconds[row][stage] for timer in timers) for stage in stages[:-1]}
        rest = statistics.median(times[i] for times in whole) - sum(by_stage.values())
        seconds[row] = by_stage | {_REST: max(0.0, rest)}
    return Profile(rows, stages, seconds, dict(timers[0].operations), batch)


# --------------------------------------------------------------------------------------------------------- the command


def run(
    output: Path, model: str, path: str | None, backend: str, device: str, precision: str, batch_size: int | None,
    chosen: dict[str, Any],
) -> None:
    """Measure, print the table and draw the picture `output`."""
    check_precision(precision)
    if path is None and model in PRESETS:
        pipeline, sampling = _random_pipeline(model, device, backend), Sampling(1.5, 900, 0.96)
        sampling = Sampling(**(dataclasses.asdict(sampling) | {k: v for k, v in chosen.items() if v is not None}))
        name = f"{model}, random weights"
    else:
        opened = open_model(model, path, backend, device)
        pipeline, sampling, name = opened.pipeline, sampling_for(opened, **chosen), opened.name
    batch = batch_size or (default_batch_size(pipeline.var.config) if model == EMBEDDED else 1)
    profile = measure(pipeline, sampling, batch, precision)
    title = f"{name}: {batch} image{'s' * (batch > 1)}, {precision}, {sampling}, {_machine(device)}"
    _print(profile, title)
    figure = draw(profile, title)
    write_atomically(output, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    say(f"{output}: {profile.total:.3f} s, {profile.total / batch:.3f} s per image")


def _machine(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' * (threads > 1)}"


def _shown(profile: Profile) -> list[str]:
    """The stages that take time."""
    return [stage for stage in profile.stages if sum(row[stage] for row in profile.seconds.values()) > 0]


def _print(profile: Profile, title: str) -> None:
    stages = _shown(profile)
    table = Table(
        title=f"{title}: ms", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("scale")
    for column in (*stages, "all"):
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))

    def add(name: str, times: Sequence[float], style: str | None = None) -> None:
        table.add_row(name, *(f"{1e3 * t:.1f}" if t else "" for t in (*times, sum(times))), style=style)

    for row in profile.rows:
        add(row, [profile.seconds[row][stage] for stage in stages])
    sums = [sum(row[stage] for row in profile.seconds.values()) for stage in stages]
    add("all", sums, "bold")
    table.add_row("share", *(f"{t / profile.total:.1%}" for t in (*sums, profile.total)))
    rates = [profile.operations.get(stage, 0.0) / seconds / 1e9 for stage, seconds in zip(stages, sums, strict=True)]
    table.add_row("GFLOP/s", *(f"{rate:.0f}" if rate else "" for rate in rates), "")
    console.print(table)


def draw(profile: Profile, title: str) -> Any:
    """A figure with a bar for each scale and one for the decoder, divided by stage."""
    try:
        # pyplot is not used, because it keeps figures in the process and may need a display.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f'profile needs matplotlib: pip install "var-kernels[plots]" ({error})') from error

    figure = Figure(figsize=(9, 0.45 * len(profile.rows) + 1.8), layout="constrained")
    axis = figure.subplots()
    begin = [0.0] * len(profile.rows)
    for number, stage in enumerate(_shown(profile)):
        times = [1e3 * profile.seconds[row][stage] for row in profile.rows]
        colour = "lightgrey" if stage == _REST else f"C{number}"
        share = sum(times) / profile.total / 1e3
        axis.barh(range(len(times)), times, left=begin, color=colour, label=f"{stage} ({share:.1%})")
        begin = [left + length for left, length in zip(begin, times, strict=True)]
    for y, length in enumerate(begin):
        axis.text(length, y, f" {length:.0f}" if length >= 10 else f" {length:.1f}", va="center", fontsize=8)
    axis.set_yticks(range(len(profile.rows)), profile.rows)
    axis.invert_yaxis()
    axis.set_xlabel("ms")
    axis.set_xlim(0, 1.08 * max(begin))
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="best")
    return figure
