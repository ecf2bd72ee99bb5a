"""Takes image files through the tokenizer and back: the work of `python -m var reconstruct`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.images import decode, resized_size, square
from ..data.interface import to_unit_range
from ..data.pictures import comparison, to_pictures, write_png
from ..evaluation.metrics import psnr
from ..model.vqvae import VQVAE
from .console import note, say

_BATCH = 16


class Picture(NamedTuple):
    """One image file, resized and cropped for the model."""

    path: Path
    image: Tensor  # (3, S, S) float32 in [−1, 1]


def read_image(path: Path, size: int) -> Picture:
    """An image file as RGB, upright: its shorter side is resized to `size` pixels and its centre is cut out.

    If this changes the image, a line on stderr says so. Raises DataError, naming the file, if it is no image or broken.
    """
    rgb, (width, height) = decode(path, size)
    if (width, height) != (size, size):
        resized = "{}×{}".format(*resized_size((width, height), size))
        steps = [] if min(width, height) == size else [f"resized to {resized}"]
        steps += [] if width == height else [f"cropped to its central {size}×{size} pixels"]
        note(f"{path}: {width}×{height} pixels, {' and '.join(steps)} for this model")
    return Picture(path, to_unit_range(torch.from_numpy(square(rgb, size, size).copy()).permute(2, 0, 1)))


def reconstruct(vqvae: VQVAE, images: Tensor, precision: str = "fp32") -> Tensor:
    """Reconstructions (B, 3, S, S) float32 in [−1, 1], on the CPU."""
    device = vqvae.quant_conv.weight.device
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return torch.cat([vqvae.reconstruct(part.to(device)).float().cpu() for part in images.split(_BATCH)])


def run(pictures: Sequence[Picture], vqvae: VQVAE, precision: str, output: Path) -> None:
    """Write a sheet of pairs (.png) or every reconstruction to a folder, and print the PSNR of each image."""
    originals = torch.stack([picture.image for picture in pictures])
    reconstructions = reconstruct(vqvae, originals, precision)
    if output.suffix.lower() == ".png" and not output.is_dir():
        write_png(output, comparison(originals, reconstructions, _distinct([p.path.stem for p in pictures])))
        files = [output] * len(pictures)
    else:
        stems = _distinct([picture.path.stem for picture in pictures])
        files = [output / f"{stem}-reconstruction.png" for stem in stems]
        for file, picture in zip(files, to_pictures(reconstructions), strict=True):
            write_png(file, picture)
    for picture, file, ratio in zip(pictures, files, psnr(reconstructions, originals).tolist(), strict=True):
        say(f"{picture.path}: PSNR {ratio:.1f} dB, {file}")


def _distinct(stems: Sequence[str]) -> list[str]:
    """The names, with a number where one occurs again, so that files of the same name in several folders differ."""
    seen: set[str] = set()
    names = []
    for stem in stems:
        name, number = stem, 1
        while name in seen:
            number += 1
            name = f"{stem}-{number}"
        seen.add(name)
        names.append(name)
    return names
