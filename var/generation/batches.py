"""Generation of many images: default options, a seed for each image, and batches that fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.config import PRESETS, VARConfig
from ..model.opening import OpenModel, Pipeline
from . import memory
from .generator import Generator
from .request import PRECISIONS

# Released models are sampled as in the paper. Other models may carry their own values in their file's metadata.
_SAMPLING = {"cfg": 1.5, "top_k": 0, "top_p": 0.96}
_RELEASED_SAMPLING = {**_SAMPLING, "top_k": 900}
_CACHE_BYTES = 1 << 30
_LARGEST_BATCH = 100


@dataclass(frozen=True)
class Sampling:
    """Options of `var.generate` that shape the distribution."""

    cfg: float
    top_k: int
    top_p: float
    more_smooth: bool = False

    def __str__(self) -> str:
        return f"cfg {self.cfg:g}, top_k {self.top_k}, top_p {self.top_p:g}" + ", more_smooth" * self.more_smooth


class Batch(NamedTuple):
    """Some of the generated images; `numbers` are their places in the list of labels."""

    numbers: list[int]
    labels: list[int]
    tokens: Tensor  # (B, L) int64
    images: Tensor  # (B, 3, H, W) float32 in [−1, 1]


def sampling_for(model: OpenModel, **chosen: Any) -> Sampling:
    """The options for this model: those in `chosen` that are not None, then those that the model's file recommends
    (sampling_cfg, …), then those of the paper."""
    values: dict[str, Any] = dict(_RELEASED_SAMPLING if model.name in PRESETS else _SAMPLING)
    for name, kind in (("cfg", float), ("top_k", int), ("top_p", float)):
        if f"sampling_{name}" in model.metadata:
            values[name] = kind(model.metadata[f"sampling_{name}"])
    return Sampling(**(values | {name: value for name, value in chosen.items() if value is not None}))


def default_batch_size(config: VARConfig) -> int:
    """The largest number of images whose KV cache, in fp32 and with guidance, stays within 1 GiB, at most 100."""
    return max(1, min(_LARGEST_BATCH, _CACHE_BYTES // memory.cache_bytes(config, 2, 4)))


def image_seeds(seed: int, numbers: Sequence[int]) -> list[int]:
    """The seed of each image: the request's seed in the upper 32 bits, the image's number in the lower 32 bits, so that
    two requests with different seeds share no image seed."""
    pairs = [seed.to_bytes(4, "big") + number.to_bytes(4, "big") for number in numbers]
    return [int.from_bytes(pair, "big", signed=True) for pair in pairs]


def generate_batches(
    pipeline: Pipeline,
    labels: Sequence[int],
    sampling: Sampling,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    precision: str = "fp32",
    advance: Callable[[], None] = lambda: None,
    done: frozenset[int] = frozenset(),
    pack: bool = True,
) -> Iterator[Batch]:
    """Generate one image per label, except the images whose numbers are in `done`. `advance()` is called after every
    scale.

    An image depends on `seed`, its number and its label only. It depends neither on the batch size nor on `done`.
    Raises ValueError for a batch that does not fit into memory.
    """
    numbers = [number for number in range(len(labels)) if number not in done]
    if not numbers:
        return
    device = pipeline.var.pos_1LC.device
    size = min(batch_size or default_batch_size(pipeline.var.config), len(numbers))
    itemsize = PRECISIONS[precision].itemsize
    backend = pipeline.var.backend if pack else "reference"
    memory.check_batch(pipeline.var.config, pipeline.vqvae.config, size, itemsize, device, backend)
    generator = Generator(pipeline.var, pipeline.vqvae, batch_size=size, precision=precision, pack=pack)
    results = generator.stream(
        torch.tensor([labels[number] for number in numbers], device=device), seeds=image_seeds(seed, numbers),
        on_scale=lambda k, partial: advance(), **dataclasses.asdict(sampling),
    )
    for start, generated in zip(range(0, len(numbers), size), results, strict=True):
        part = numbers[start : start + size]
        yield Batch(part, [labels[number] for number in part], generated.tokens.cpu(), generated.images.cpu())


def count_scales(pipeline: Pipeline, images: int, batch_size: int | None = None) -> int:
    """How often `generate_batches` calls `advance` for this number of images."""
    size = batch_size or default_batch_size(pipeline.var.config)
    return -(-images // size) * pipeline.var.config.schedule.num_scales
