"""Makes pictures with the model and compares the kernels with the reference: the work of `python -m var demo`."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

import var_kernels
from var_kernels import backends
from var_kernels.testing import SHAPES, attention_inputs, modulation, randn

from ..data.datasets import open_dataset
from ..data.fashion_mnist import FASHION_MNIST_CLASSES
from ..data.interface import DataError, ImageData
from ..data.pictures import comparison, grid_by_label, scale_strip, write_png
from ..evaluation.metrics import psnr
from ..generation.batches import (
    Sampling,
    count_scales,
    generate_batches,
    image_seeds,
    sampling_for,
)
from ..generation.generator import Generator
from ..generation.request import Generated
from ..model.opening import OpenModel, Pipeline, open_model
from .console import console, note, progress, say

_CLASSES = 10
_STRIP_CLASSES = 5
# Timed generations per backend, after one that warms up. After this many seconds no further one begins.
_ROUNDS, _GENERATION_SECONDS = 3, 12.0
_OP_SECONDS = 0.5  # how long each op is timed
_SHAPE = "d16"


def run(output: Path, model: str, path: str | None, backend: str, seed: int, data: Path | None, per_class: int) -> None:
    """Write the pictures to `output` and print the tables."""
    opened = open_model(model, path, backend)
    sampling, config = sampling_for(opened), opened.pipeline.var.config
    # All classes, or ten evenly spread ones if there are more than ten.
    classes = [i * config.num_classes // _CLASSES for i in range(_CLASSES)] if config.num_classes > _CLASSES \
        else list(range(config.num_classes))
    test = _test_images(opened, data)
    say(f"{opened.name}: {sampling}, seed {seed}")
    _write_grid(output / "grid.png", opened, sampling, classes, seed, per_class)
    _write_strip(output / "coarse-to-fine.png", opened, sampling, classes, seed)
    if test is not None:
        _write_reconstructions(output / "reconstructions.png", opened, test)
    reference = open_model(model, path, "reference").pipeline
    _print_generation(reference, opened.pipeline, backend, sampling, classes, seed)
    _print_ops(backend)


# ------------------------------------------------------------------------------------------------------- pictures


def _write_grid(
    path: Path, opened: OpenModel, sampling: Sampling, classes: Sequence[int], seed: int, count: int
) -> None:
    labels = [label for label in classes for _ in range(count)]
    started = time.perf_counter()
    with progress("generating", count_scales(opened.pipeline, len(labels))) as advance:
        batches = list(generate_batches(opened.pipeline, labels, sampling, seed=seed, advance=advance))
    seconds = time.perf_counter() - started
    images = torch.cat([batch.images for batch in batches])
    write_png(path, grid_by_label(images, labels, opened.pipeline.class_names))
    say(f"{path}: {len(labels)} generated images of {len(classes)} classes, in {seconds:.1f} s")


def _write_strip(path: Path, opened: OpenModel, sampling: Sampling, classes: Sequence[int], seed: int) -> None:
    pipeline = opened.pipeline
    labels = (classes[1 :: max(1, len(classes) // _STRIP_CLASSES)] or classes)[:_STRIP_CLASSES]
    (batch,) = generate_batches(pipeline, labels, sampling, seed=seed, batch_size=len(labels))
    steps = pipeline.vqvae.decode_scales(batch.tokens)
    names = [pipeline.class_names[label] for label in labels]
    write_png(path, scale_strip(steps, names, pipeline.var.config.patch_nums))
    say(f"{path}: {len(labels)} images, decoded after each of the {len(steps)} scales")


def _test_images(opened: OpenModel, data: Path | None) -> ImageData | None:
    """Images of the model's data set. If there are none, a line says why, but data that was named must be there."""
    if data is None and opened.pipeline.var.config.class_names != FASHION_MNIST_CLASSES:
        note("no reconstructions: name the data set of this model with --data")
        return None
    try:
        test = open_dataset(data, "test", opened.pipeline.vqvae.config.image_size)
    except DataError as error:
        if data is not None:
            raise
        note(f"no reconstructions of real images: {error}")
        return None
    for line in test.remarks():
        note(line)
    return test


def _write_reconstructions(path: Path, opened: OpenModel, test: ImageData) -> None:
    labels = [label for label in range(len(test.class_names)) if (test.labels == label).any()][:_CLASSES]
    originals, _ = test.batch(torch.tensor([int((test.labels == label).nonzero()[0]) for label in labels]))
    reconstructions = opened.pipeline.vqvae.reconstruct(originals)
    ratio = float(psnr(reconstructions, originals).mean())
    write_png(path, comparison(originals, reconstructions, [test.class_names[label] for label in labels]))
    say(f"{path}: {len(labels)} test images of {test.name} through the tokenizer and back, PSNR {ratio:.1f} dB")


# --------------------------------------------------------------------------------------------------------- tables


def _print_generation(
    reference: Pipeline, ours: Pipeline, backend: str, sampling: Sampling, classes: Sequence[int], seed: int
) -> None:
    labels, seeds = torch.tensor(classes), image_seeds(seed, range(len(classes)))
    options = {"seeds": seeds, **dataclasses.asdict(sampling)}
    plain_generator = Generator(reference.var, reference.vqvae, batch_size=len(classes))
    our_generator = Generator(ours.var, ours.vqvae, batch_size=len(classes))

    def timed(generator: Generator) -> tuple[float, Generated]:
        started = time.perf_counter()
        generated = generator(labels, **options)
        return time.perf_counter() - started, generated

    end = time.perf_counter() + _GENERATION_SECONDS
    with progress("timing generation", 1 + _ROUNDS) as advance:
        rounds = []
        while len(rounds) < 2 or (len(rounds) < 1 + _ROUNDS and time.perf_counter() < end):
            # Alternating, so that both run under the same conditions of the machine.
            rounds.append((timed(plain_generator), timed(our_generator)))
            advance()
    threads, best = torch.get_num_threads(), len(rounds) - 1
    table = _table(
        f"Generation: {len(classes)} images in fp32, {threads} thread{'s' * (threads > 1)}, best of {best}",
        ("kernels",), ("ms per image", "speed-up", "equal tokens", "pixel difference (of 255)"),
    )
    plain, fast = (min(round_[side][0] for round_ in rounds[1:]) for side in (0, 1))
    (_, expected), (_, got) = rounds[0]
    difference = float((got.images - expected.images).abs().max()) * 127.5
    equal = int((got.tokens == expected.tokens).sum())
    table.add_row("reference (plain PyTorch)", f"{1e3 * plain / len(classes):.1f}", "1.00", "", "")
    table.add_row(
        _served_by(backend), f"{1e3 * fast / len(classes):.1f}", f"{plain / fast:.2f}",
        f"{equal} of {expected.tokens.numel()}", f"{difference:.2g}",
    )
    console.print(table)


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _served_by(backend: str) -> str:
    names = {backends.resolve(op, backend, "cpu", torch.float32) for op in backends.OPS}
    return "ours: " + ", ".join(sorted(names))


class _Case(NamedTuple):
    """One op at one shape: `call(backend)` runs it."""

    op: str
    shape: str
    call: Callable[[str], Any]


def _cases() -> list[_Case]:
    shape = SHAPES[_SHAPE]
    length, width = shape.length, shape.width
    q, k, v = attention_inputs(2, shape.heads, length, shape.head_dim, seed=0)
    x, branch = randn(2, length, width, seed=1), randn(2, length, width, seed=2)
    gate, scale, shift = modulation(2, width, seed=3)
    z, codebook = randn(2048, 32, seed=4), randn(4096, 32, seed=5)
    side = shape.patch_nums[-1]
    f = randn(2, 32, side, side, seed=6)
    phi_weight, phi_bias = randn(4, 32, 32, 3, 3, seed=7, std=0.05), randn(4, 32, seed=8, std=0.05)
    rows = f"2×{length}×{width}"
    return [
        _Case("block_causal_attention", f"2×{shape.heads}×{length}×{shape.head_dim}", lambda backend:
              var_kernels.block_causal_attention(q, k, v, shape.scale_lens, backend=backend)),
        _Case("adaln_layer_norm", rows, lambda backend:
              var_kernels.adaln_layer_norm(x, scale, shift, backend=backend)),
        _Case("gated_residual_adaln", rows, lambda backend:
              var_kernels.gated_residual_adaln(x, branch, gate, scale, shift, backend=backend)),
        _Case("nearest_code", "2048×32 in 4096×32", lambda backend:
              var_kernels.nearest_code(z, codebook, backend=backend)),
        _Case("multi_scale_quantize", f"2×32×{side}×{side} in 4096×32", lambda backend:
              var_kernels.multi_scale_quantize(f, codebook, phi_weight, phi_bias, shape.patch_nums, backend=backend)),
    ]


def _print_ops(backend: str) -> None:
    table = _table(
        f"Kernels: shapes of VAR-{_SHAPE} at 256 pixels, fp32, forward, median ms",
        ("op", "shape", "ours"), ("reference", "ours", "speed-up", "difference"),
    )
    cases = _cases()
    with torch.inference_mode(), progress("timing kernels", len(cases)) as advance:
        for op, shape, call in cases:
            difference = _difference(call(backend), call("reference"))
            plain, fast = _times(lambda call=call: call("reference"), lambda call=call: call(backend))
            name = backends.resolve(op, backend, "cpu", torch.float32)
            table.add_row(op, shape, name, f"{1e3 * plain:.2f}", f"{1e3 * fast:.2f}", f"{plain / fast:.1f}", difference)
            advance()
    console.print(table)
    note("The reference is the specification: plain PyTorch, in a wider dtype where it has to be exact. `pytest "
         "benchmarks/ --benchmark-only` compares the kernels with SDPA, torch.compile, FlexAttention and others.")


def _difference(got: Any, expected: Any) -> str:
    """Largest absolute difference of the results. For codes it is the number of those that differ."""
    pairs = list(zip(got, expected, strict=True)) if isinstance(got, tuple) else [(got, expected)]
    largest = [float((a - b).abs().max()) for a, b in pairs if a.is_floating_point()]
    different = [int((a != b).sum()) for a, b in pairs if not a.is_floating_point()]
    parts = [f"{max(largest):.1e}"] if largest else []
    return ", ".join(parts + [f"{count} codes" for count in different])


def _times(*calls: Callable[[], Any]) -> list[float]:
    """Median seconds of each call. The calls alternate, so that they run under the same conditions of the machine.

    Every other round has the reverse order, because a call finds in the caches what the call before it has used.
    """
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + _OP_SECONDS
    order = list(zip(calls, samples, strict=True))
    while time.perf_counter() < end or len(samples[0]) < 2:
        for call, times in order:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        order.reverse()
    return [statistics.median(times) for times in samples]
