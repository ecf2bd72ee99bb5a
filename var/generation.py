"""From a model's name and a list of labels to files of images: the work behind `python -m var generate`."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import checkpoints
from .checkpoints import EMBEDDED, Pipeline
from .config import PRESETS, VARConfig
from .data import to_uint8
from .pictures import grid_by_label, to_pictures, write_png

# Released models: the protocol of the paper. Others may carry their own values in their file's metadata.
_SAMPLING = {"cfg": 1.5, "top_k": 0, "top_p": 0.96}
_RELEASED_SAMPLING = {**_SAMPLING, "top_k": 900}
_CACHE_BYTES = 1 << 30
_LARGEST_BATCH = 100
_SEED_STRIDE = 1_000_003  # between batches: neighbouring seeds of the user share no batch


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
    """Some of the generated images."""

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
    return 2 * 2 * config.schedule.length * config.width * config.depth * itemsize


def default_batch_size(config: VARConfig) -> int:
    """As many images as keep the KV cache within 1 GiB, at most 100."""
    return max(1, min(_LARGEST_BATCH, _CACHE_BYTES // cache_bytes(config)))


def autocast(precision: str, device: str = "cpu") -> contextlib.AbstractContextManager[Any]:
    """bf16 autocast for "bf16", nothing for "fp32"."""
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision: expected fp32 or bf16, got {precision!r}")
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


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
) -> Iterator[Batch]:
    """Generate one image per label, batch by batch; `advance()` is called after every scale.

    The first batch uses `seed` itself, as `var.generate` would; later ones seeds that follow from it. The same seed,
    labels and batch size give the same images.
    """
    device = str(pipeline.var.pos_1LC.device)
    size = batch_size or default_batch_size(pipeline.var.config)
    for number, start in enumerate(range(0, len(labels), size)):
        part = list(labels[start : start + size])
        with autocast(precision, device):
            generated = pipeline.var.generate(
                pipeline.vqvae, torch.tensor(part, device=device), seed=seed + _SEED_STRIDE * number,
                on_scale=lambda k, f_hat: advance(), **dataclasses.asdict(sampling),
            )
        yield Batch(part, generated.tokens.cpu(), generated.images.float().cpu())


def count_scales(pipeline: Pipeline, images: int, batch_size: int | None = None) -> int:
    """How often `generate_batches` calls `advance` for so many images."""
    size = batch_size or default_batch_size(pipeline.var.config)
    return -(-images // size) * pipeline.var.config.schedule.num_scales


# ----------------------------------------------------------------------------------------------------------- files


def write(output: Path, batches: Iterator[Batch], labels: Sequence[int], opened: OpenModel, how: str) -> str:
    """Write generated images as `output` asks: a .npz file, one sheet as .png, or a folder of .png files.

    `how` describes the sampling in the text of PNG files. Returns what was written, for a message.
    """
    names, description = opened.pipeline.class_names, f"var {opened.name}: {how}"
    if output.suffix.lower() == ".npz" and not output.is_dir():
        write_npz(output, batches, len(labels), opened.pipeline.vqvae.config.image_size)
    elif output.suffix.lower() == ".png" and not output.is_dir():
        images = torch.cat([batch.images for batch in batches])
        write_png(output, grid_by_label(images, labels, names), description)
    else:
        number = 0
        digits = max(3, len(str(len(labels) - 1)))
        for batch in batches:
            for label, picture in zip(batch.labels, to_pictures(batch.images), strict=True):
                write_png(output / f"{number:0{digits}d}-{file_stem(names[label])}.png", picture, description)
                number += 1
    return str(output)


def write_npz(path: Path, batches: Iterator[Batch], count: int, image_size: int) -> None:
    """Write ``arr_0`` (N, H, W, 3) uint8, the one array that the ADM evaluator reads, then ``labels`` and ``tokens``.

    Images are written as they come, so the size of the set is not limited by memory; the file appears when complete.
    """

    def write(temporary: str) -> None:
        labels: list[int] = []
        tokens: list[np.ndarray] = []
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, image_size, image_size, 3)}
                np.lib.format.write_array_header_1_0(member, header)
                for batch in batches:
                    member.write(to_uint8(batch.images).permute(0, 2, 3, 1).contiguous().numpy().tobytes())
                    labels += batch.labels
                    tokens.append(batch.tokens.numpy())
            for name, array in (("labels", np.asarray(labels)), ("tokens", np.concatenate(tokens))):
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    checkpoints.write_atomically(path, write)


def file_stem(name: str) -> str:
    """A class name as part of a file name: lower case, letters and digits, joined by hyphens."""
    return re.sub(r"\W+", "-", name.casefold()).strip("-") or "image"
