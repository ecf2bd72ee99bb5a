"""Opens data sets of images by class: Fashion-MNIST from its IDX files, or any folder with one sub-folder per class.

The training loops use the same interface of every data set, `ImageData`: ``len(data)``, ``data.labels`` (N,) int64,
and ``data.batch(indices, generator=None) -> (images, labels)`` with images (B, 3, S, S) float32 in [-1, 1], besides its
names.
"""

from __future__ import annotations

import os
from pathlib import Path

from .fashion_mnist import FASHION_MNIST_CLASSES, FashionMNIST, find_fashion_mnist, holds_idx_files, read_idx
from .folders import EXPECTED, ImageFolder
from .interface import (
    DataError,
    ImageData,
    batch_indices,
    default_held_out,
    describe,
    split_indices,
    step_generator,
    to_uint8,
    to_unit_range,
)

__all__ = [
    "FASHION_MNIST_CLASSES", "DataError", "FashionMNIST", "ImageData", "ImageFolder", "batch_indices",
    "default_held_out", "describe", "find_fashion_mnist", "open_dataset", "read_idx", "split_indices", "step_generator",
    "to_uint8", "to_unit_range",
]

_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}  # names of folders


def open_dataset(
    path: str | Path | None = None,
    split: str = "train",
    image_size: int = 32,
    *,
    random_crop: bool = False,
    flip: bool = False,
    skip_broken: bool = False,
) -> ImageData:
    """Data set at `path`: Fashion-MNIST if `path` is None or holds its IDX files, else a folder of images by class.

    If a folder has sub-folders ``train`` and ``test`` (or ``val``, ``valid``, ``validation``), they are its splits. Any
    other folder serves as both splits. `random_crop` and `flip` apply to the training split of folders; `skip_broken`
    applies to folders.
    """
    if path is None:
        return FashionMNIST(None, split, image_size)
    root = Path(os.path.expanduser(path))
    if not root.is_dir():
        raise DataError(f"{root}: not a directory: expected Fashion-MNIST's IDX files or {EXPECTED}")
    if holds_idx_files(root):
        return FashionMNIST(root, split, image_size)
    if split not in _SPLITS:
        raise DataError(f"split: expected one of {sorted(_SPLITS)}, got {split!r}")
    if all(any((root / name).is_dir() for name in names) for names in _SPLITS.values()):
        root = next(root / name for name in _SPLITS[split] if (root / name).is_dir())
    augment = split == "train"
    return ImageFolder(
        root, image_size, random_crop=random_crop and augment, flip=flip and augment, skip_broken=skip_broken
    )
