"""From a model's name and a list of labels to files of images: the work behind `python -m var generate`."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import checkpoints, memory
from .checkpoints import EMBEDDED, Pipeline
from .config import PRESETS, VARConfig
from .inference import PRECISIONS
from .sampler import Generator

# Released models: the protocol of the paper. Others may carry their own values in their file's metadata.
_SAMPLING = {"cfg": 1.5, "top_k": 0, "top_p": 0.96}
_RELEASED_SAMPLING = {**_SAMPLING, "top_k": 900}
_CACHE_BYTES = 1 << 30
_LARGEST_BATCH = 100


class OpenModel(NamedTuple):
    """A pipeline with what its files say about it."""

    name: str
    pipeline: Pipeline
    metadata: dict[str, str]  # of the transformer's file


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


# -------------------------------------------------------------------------------------------------------- models


def open_model(model: str, path: str | None = None, backend: str = "auto", device: str = "cpu") -> OpenModel:
    """The embedded model, a released one from `path`, or the one in the folder `model`; see `var.load`."""
    if path is None and model in PRESETS:
        raise ValueError(
            f"--path: the weights of {model} are not part of this package: name a folder with var_{model}.pth and "
            f"{checkpoints.RELEASED_VAE}, or a Hub id such as FoundationVision/var to download them"
        )
    if path is None and model != EMBEDDED:
        path = str(_saved_folder(model))
    metadata = file_metadata(Path(path or checkpoints.WEIGHTS) / "var.safetensors")
    return OpenModel(model, checkpoints.load(model, path=path, backend=backend, device=device), metadata)


def _saved_folder(model: str) -> Path:
    folder = Path(model).expanduser()
    if folder.name == "var.safetensors":
        folder = folder.parent
    if not (folder / "var.safetensors").is_file():
        raise ValueError(f"--model: expected one of {', '.join((EMBEDDED, *PRESETS))}, or a folder with "
                         f"var.safetensors and vqvae.safetensors, got {model!r}")
    return folder


def file_metadata(path: Path) -> dict[str, str]:
    """Metadata in the header of a .safetensors file; none if there is no such file."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from error


def sampling_for(model: OpenModel, **chosen: Any) -> Sampling:
    """`chosen` where given; else what the model's file recommends (sampling_cfg, …), else the paper's values."""
    values: dict[str, Any] = dict(_RELEASED_SAMPLING if model.name in PRESETS else _SAMPLING)
    for name, kind in (("cfg", float), ("top_k", int), ("top_p", float)):
        if f"sampling_{name}" in model.metadata:
            values[name] = kind(model.metadata[f"sampling_{name}"])
    return Sampling(**(values | {name: value for name, value in chosen.items() if value is not None}))


def cache_bytes(config: VARConfig, itemsize: int = 4) -> int:
    """Bytes of the KV cache for one image: keys and values of all layers, with and without the class (guidance)."""
    return memory.cache_bytes(config, 2, itemsize)


def default_batch_size(config: VARConfig) -> int:
    """As many images as keep the KV cache within 1 GiB, at most 100."""
    return max(1, min(_LARGEST_BATCH, _CACHE_BYTES // cache_bytes(config)))


def check_precision(precision: str) -> str:
    """`precision`; ValueError if it is none."""
    if precision not in PRECISIONS:
        raise ValueError(f"--precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    return precision


def image_seeds(seed: int, numbers: Sequence[int]) -> list[int]:
    """The seed of each image: that of the request above, its number below, so that no two requests share one."""
    pairs = [seed.to_bytes(4, "big") + number.to_bytes(4, "big") for number in numbers]
    return [int.from_bytes(pair, "big", signed=True) for pair in pairs]


def fingerprint(pipeline: Pipeline) -> str:
    """Eight digits that differ between models: a retrained one does not continue the images of its predecessor."""
    digest = hashlib.sha256()
    for tensor in (pipeline.var.head.weight, pipeline.vqvae.decoder.conv_out.weight):
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


# -------------------------------------------------------------------------------------------------------- labels


def parse_labels(text: str, class_names: Sequence[str], count: int = 1) -> list[int]:
    """Class numbers of a list such as ``"0,3-5,trouser*4,all"``: numbers, names, ranges.

    ``*N`` asks for N images of an item; items without it stand for `count` images. Names are compared without case.
    Raises ValueError for a number out of range, an unknown name, or an empty list.
    """
    names = {name.casefold(): label for label, name in enumerate(class_names)}
    labels: list[int] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        repeated = re.fullmatch(r"(.+?)\s*[*×]\s*(\d+)", item)
        if item.casefold() not in names and repeated:
            members, times = _members(repeated[1], names, class_names), int(repeated[2])
        else:
            members, times = _members(item, names, class_names), count
        labels += [label for label in members for _ in range(times)]
    if not labels:
        raise ValueError(f"--labels: expected at least one class, got {text!r}")
    return labels


def _members(item: str, names: dict[str, int], class_names: Sequence[str]) -> Sequence[int]:
    last = len(class_names) - 1
    if item.casefold() in names:
        return [names[item.casefold()]]
    if item.casefold() == "all":
        return range(last + 1)
    numbers = re.fullmatch(r"(-?\d+)(?:\s*-\s*(\d+))?", item)
    if numbers is None:
        near = difflib.get_close_matches(item.casefold(), names, n=3)
        known = [class_names[names[name]] for name in near] or list(class_names[:20])
        raise ValueError(f"--labels: expected numbers and ranges within 0-{last}, all, or names such as "
                         f"{', '.join(known)}, got {item!r}")
    first, final = int(numbers[1]), int(numbers[2] or numbers[1])
    if not 0 <= first <= final <= last:
        raise ValueError(f"--labels: expected class numbers in 0-{last}, got {item!r}")
    return range(first, final + 1)


# ---------------------------------------------------------------------------------------------------- generating


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
    """Generate one image per label, but for those whose numbers are `done`; `advance()` is called after every scale.

    An image depends on `seed`, its number and its label only: not on the batch size, nor on what is done.
    Raises ValueError for a batch that does not fit into memory.
    """
    numbers = [number for number in range(len(labels)) if number not in done]
    if not numbers:
        return
    device = pipeline.var.pos_1LC.device
    size = min(batch_size or default_batch_size(pipeline.var.config), len(numbers))
    itemsize = PRECISIONS[check_precision(precision)].itemsize
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
    """How often `generate_batches` calls `advance` for so many images."""
    size = batch_size or default_batch_size(pipeline.var.config)
    return -(-images // size) * pipeline.var.config.schedule.num_scales
