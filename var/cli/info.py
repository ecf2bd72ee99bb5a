"""Describes a model without running it: the work of `python -m var info`."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import nn

from ..generation import memory
from ..generation.batches import sampling_for
from ..model.checkpoints import file_metadata
from ..model.config import PRESETS, ScaleSchedule
from ..model.opening import EMBEDDED, WEIGHTS, Pipeline, open_model
from ..model.transformer import VAR
from ..model.vqvae import VQVAE
from .console import console, say
from .labels import are_numbers

_MIB = 1 << 20
_STORED = ("model", "config")  # metadata that the table of the configuration shows already


def run(model: str, path: str | None) -> None:
    """Print the configuration, schedule, parameters and memory of a model, and the metadata of its files."""
    if path is None and model in PRESETS:
        with torch.device("meta"):
            pipeline = Pipeline(*(kind(config) for kind, config in zip((VQVAE, VAR), PRESETS[model], strict=True)))
        say(f"{model}: released model, described without its weights (--path names them)")
        sampling, folder = None, None
    else:
        opened = open_model(model, path)
        pipeline, sampling = opened.pipeline, sampling_for(opened)
        folder = WEIGHTS if path is None and model == EMBEDDED else Path(path or model)
        say(f"{model}: {folder}")
    console.print(_configuration(pipeline))
    console.print(_schedule(pipeline.var.config.schedule))
    console.print(_sizes(pipeline))
    if pipeline.var.config.class_names:
        # Of classes with numbers as names, --labels takes the names, so their places would mislead.
        numbered = [f"{label} {name}" for label, name in enumerate(pipeline.class_names)]
        say(f"classes: {', '.join(pipeline.class_names if are_numbers(pipeline.class_names) else numbered)}")
    if sampling is not None:
        say(f"sampling by default: {sampling}")
    if folder is not None:
        _print_metadata(folder if folder.is_dir() else folder.parent)


def _table(title: str, *columns: str, numbers: bool = False) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and i else "left", no_wrap=True)
    return table


def _configuration(pipeline: Pipeline) -> Table:
    table = _table("Configuration", "tokenizer (VQVAE)", "", "transformer (VAR)", "")
    halves = []
    for config in (pipeline.vqvae.config, pipeline.var.config):
        values = {name: value for name, value in config.to_dict().items() if name not in ("patch_nums", "class_names")}
        derived = "image_size" if config is pipeline.vqvae.config else "head_dim"
        values[derived] = getattr(config, derived)
        halves.append([(name, _plain(value)) for name, value in values.items()])
    for left, right in itertools.zip_longest(*halves, fillvalue=("", "")):
        table.add_row(*left, *right)
    return table


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _schedule(schedule: ScaleSchedule) -> Table:
    title = f"Scales: {schedule.length} tokens per image"
    table = _table(title, "scale", "map", "tokens", "tokens so far", numbers=True)
    for k, (side, start, length) in enumerate(zip(schedule.patch_nums, schedule.starts, schedule.lengths, strict=True)):
        table.add_row(str(k + 1), f"{side}×{side}", str(length), str(start + length))
    return table


def _sizes(pipeline: Pipeline) -> Table:
    table = _table("Parameters and memory", "part", "parameters", "fp32 MiB", "bf16 MiB", numbers=True)
    vqvae, var = pipeline
    parts = {
        "tokenizer: encoder": [vqvae.encoder, vqvae.quant_conv],
        "tokenizer: codebook and φ": [vqvae.quantize],
        "tokenizer: decoder": [vqvae.decoder, vqvae.post_quant_conv],
        "transformer": [var],
    }
    counts = {name: sum(map(_parameters, modules)) for name, modules in parts.items()}
    for name, count in (counts | {"together": sum(counts.values())}).items():
        table.add_row(name, f"{count:,}", f"{count * 4 / _MIB:,.1f}", f"{count * 2 / _MIB:,.1f}")
    cache = memory.cache_bytes(var.config, 2, 4) / _MIB
    table.add_row("KV cache, per image with guidance", "", f"{cache:,.1f}", f"{cache / 2:,.1f}")
    packed, working = (
        [f"{size(itemsize) / _MIB:,.1f}" for itemsize in (4, 2)]
        for size in (
            partial(memory.fixed_bytes, var.config, vqvae.config),
            partial(memory.batch_bytes, var.config, vqvae.config, 1),
        )
    )
    table.add_row("packed weights of a generator", "", *packed)
    table.add_row("working memory of one image, at most", "", *working)
    return table


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _print_metadata(folder: Path) -> None:
    for name in ("vqvae.safetensors", "var.safetensors"):
        file = folder / name
        if file.is_file():
            say(f"{name}: {file.stat().st_size / _MIB:.1f} MiB")
            for key, value in sorted(file_metadata(file).items()):
                if key not in _STORED:
                    say(f"  {key}: {value}")
