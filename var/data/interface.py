"""What the training loops use of a data set: its interface, the ranges of its pixels, its splits and its batches.

Which images form a batch is a pure function of (seed, step), see `batch_indices`, so a resumed training needs to know
nothing but its step number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_MOST_HELD_OUT = 2000


class DataError(ValueError):
    """A data set is missing, malformed or empty. The message names the file or directory and what was expected."""


class ImageData(Protocol):
    """The interface of a data set that the training loops use."""

    name: str
    class_names: tuple[str, ...]
    labels: Tensor  # (N,) int64
    broken: Mapping[int, str]  # what is wrong with the images that were skipped so far, by index

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32 in [-1, 1] and labels (B,), augmented if there is a generator."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes when an image is replaced, or when the images come in another order."""
        ...

    def remarks(self) -> list[str]:
        """Lines that a user of the data set should see: what is left out, and what was skipped so far."""
        ...


def describe(data: ImageData) -> str:
    """Name and size of a data set, for messages and metadata."""
    return f"{data.name}, {len(data)} images of {len(data.class_names)} classes"


# ------------------------------------------------------------------------------------------------------------ pixels


def to_unit_range(pixels: Tensor) -> Tensor:
    """Converts uint8 0..255 to float32 in [-1, 1]. 0 becomes exactly −1 and 255 exactly 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Converts [-1, 1] to uint8 0..255 by rounding; values outside are clamped. The inverse of `to_unit_range`."""
    return images.detach().to(torch.float32).add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------ splits and batches


def default_held_out(count: int, least: int = 0) -> int:
    """How many of `count` images are held out if the user does not say: a tenth, at least `least`, at most 2000."""
    return min(_MOST_HELD_OUT, max(least, count // 10))


def split_indices(count: int, held_out: int, name: str = "held_out") -> tuple[Tensor, Tensor]:
    """Indices (training, held-out) of one fixed shuffle, so that runs with different seeds can be compared.

    `name` is what the caller's user calls `held_out`, for the error.
    """
    if not 0 <= held_out < count:
        raise DataError(f"{name}: expected 0..{count - 1} of {count} images, got {held_out}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[held_out:], order[:held_out]


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Generator for one use, numbered `stream`, in training step `step`.

    It depends on its arguments only, so a resumed training draws the same numbers.
    """
    words = np.random.SeedSequence([seed, step, stream]).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def check_batch_size(batch_size: int, images: int) -> None:
    """Raise DataError if `images` training images do not make a batch."""
    if not 1 <= batch_size <= images:
        raise DataError(f"batch_size: expected 1..{images} (the number of training images), got {batch_size}")


def batch_indices(pool: Tensor | Sequence[int], batch_size: int, seed: int, step: int) -> Tensor:
    """Members of `pool` that form the batch of `step`.

    Each epoch is a shuffle that depends on (seed, epoch). It is cut into whole batches, and the rest is left out.
    """
    pool = torch.as_tensor(pool)
    check_batch_size(batch_size, len(pool))
    per_epoch = len(pool) // batch_size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(pool), generator=step_generator(seed, epoch, stream=1))
    return pool[order[position * batch_size : (position + 1) * batch_size]]
