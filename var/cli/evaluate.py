"""Measures the quality of a model and writes it as JSON: the work of `python -m var evaluate`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from var_kernels.native.build import write_atomically

from ..data.datasets import open_dataset
from ..data.interface import ImageData, default_held_out, describe, split_indices
from ..evaluation.classifier import train_classifier
from ..evaluation.quality import QualityReport, evaluate, generator_of
from ..generation.batches import default_batch_size, sampling_for
from ..model.opening import OpenModel, open_model
from .console import console, note, say

_CLASSIFIER_BATCH = 128
_UNITS = {"psnr": "dB", "mse": "of values in [−1, 1]", "code_perplexity": "codes"}


def run(
    output: Path, model: str, path: str | None, data: Path | None, backend: str, images: int,
    held_out: int | None, epochs: float, chosen: dict[str, Any], seed: int, precision: str, batch_size: int | None,
    skip_broken: bool,
) -> None:
    """Measure the model, print a table and write `output`."""
    started = time.perf_counter()
    opened = open_model(model, path, backend)
    vqvae, var = opened.pipeline
    sampling = sampling_for(opened, **chosen)
    size = vqvae.config.image_size
    train, test = (open_dataset(data, split, size, skip_broken=skip_broken) for split in ("train", "test"))
    _check_classes(opened, train)
    if test.class_names != train.class_names:
        got = f"{describe(train)} and {describe(test)}"
        raise ValueError(f"--data: expected the same classes in both splits, got {got}")
    if held_out is None:
        held_out = default_held_out(len(train), least=2)
    fit = split_indices(len(train), held_out)[0]
    note(f"training a classifier to measure with, on {len(fit)} images of {train.name}")
    classifier = train_classifier(
        train, fit, epochs=epochs, batch_size=min(_CLASSIFIER_BATCH, len(fit)), seed=seed,
        progress=lambda step, steps, loss: note(f"classifier: step {step}/{steps}, loss {loss:.3f}"),
    )
    batch_size = batch_size or default_batch_size(var.config)
    generate = generator_of(var, vqvae, batch_size=batch_size, precision=precision, **dataclasses.asdict(sampling))
    generate = _with_labels_of(train, generate, var.config.class_names)
    report = evaluate(
        vqvae, generate, train, test, classifier=classifier, num_generated=images, held_out=held_out,
        batch_size=batch_size, seed=seed, progress=note,
    )
    conditions = {
        "model": opened.name, "data": describe(test), "sampling": dataclasses.asdict(sampling), "seed": seed,
        "precision": precision, "batch_size": batch_size,
        "classifier_epochs": epochs, "backend": backend, "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 1),
    }
    text = json.dumps(conditions | {"quality": report.as_dict()}, indent=2) + "\n"
    write_atomically(output, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    for line in dict.fromkeys((*train.remarks(), *test.remarks())):
        note(line)
    _print(report, train)
    say(f"{output}: {opened.name} on {test.name}, {sampling}, seed {seed}, {precision}, {conditions['seconds']} s")


def _check_classes(opened: OpenModel, data: ImageData) -> None:
    """Raise ValueError if the data have another number of classes than the model."""
    if len(data.class_names) != opened.pipeline.var.config.num_classes:
        expected = f"the {opened.pipeline.var.config.num_classes} classes of {opened.name}"
        raise ValueError(f"--data: expected {expected}, got {describe(data)}")


def _with_labels_of(data: ImageData, generate: Callable[..., Tensor], names: Sequence[str]) -> Callable[..., Tensor]:
    """`generate` for labels of the data set, whose classes may have another order than the `names` of the model's."""
    if not names or tuple(names) == tuple(data.class_names):
        return generate
    if len(set(names)) < len(names) or set(names) != set(data.class_names):
        note(f"the classes of {data.name} have other names than those of the model: class number n counts as number n")
        return generate
    numbers = torch.tensor([names.index(name) for name in data.class_names])
    return lambda labels, seeds: generate(numbers[labels], seeds)


def _print(report: QualityReport, data: ImageData) -> None:
    table = Table(title="Quality", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("")
    for name, value in report.as_dict().items():
        if isinstance(value, int | float):
            text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
            table.add_row(name.replace("_", " "), text, _UNITS.get(name))
    for name, value in zip(data.class_names, report.class_agreement_by_class, strict=True):
        table.add_row(f"class agreement: {name}", f"{value:.4g}")
    console.print(table)
