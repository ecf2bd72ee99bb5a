"""Fashion-MNIST from its IDX files."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from .interface import DataError, to_unit_range

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# Where the IDX files can be in a directory that the user names: in the directory itself, or below it, if the Debian
# package was extracted there.
_IDX_SUBDIRS = ("", "usr/share/datasets/fashion-mnist", "share/datasets/fashion-mnist", "fashion-mnist")
_IDX_SEARCH_PATH = (Path("/usr/share/datasets/fashion-mnist"), Path("~/.cache/var/fashion-mnist"))
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

FASHION_MNIST_HELP = (
    "data: Fashion-MNIST not found: `apt-get install dataset-fashion-mnist`, or without root `apt-get download "
    "dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DIR` and pass DIR as the data folder"
)


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file, plain or gzip-compressed (recognised by its content, not by its name).

    The format is: two zero bytes, one type code, one rank byte, `rank` big-endian uint32 sizes, then the elements,
    row-major. Raises `DataError`, naming `path`, for a wrong magic number, an unknown type code, or a number of
    elements that differs from the sizes.
    """
    path = Path(path)
    raw = _read_maybe_gzip(path)
    if len(raw) < 4 or raw[0] != 0 or raw[1] != 0 or raw[2] not in _IDX_DTYPES or raw[3] == 0:
        raise DataError(f"{path}: not an IDX file: expected a magic number like 0x00000803, got 0x{raw[:4].hex()}")
    dtype, rank = np.dtype(_IDX_DTYPES[raw[2]]), raw[3]
    header = 4 + 4 * rank
    if len(raw) < header:
        raise DataError(f"{path}: truncated IDX header: expected {header} bytes, got {len(raw)}")
    shape = struct.unpack(f">{rank}I", raw[4:header])
    expected = math.prod(shape) * dtype.itemsize
    if len(raw) - header != expected:
        state = "truncated" if len(raw) - header < expected else "oversized"
        raise DataError(
            f"{path}: {state} IDX file: expected {expected} data bytes for shape {shape}, got {len(raw) - header}"
        )
    return np.frombuffer(raw, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="))


def _read_maybe_gzip(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or corrupt gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def find_fashion_mnist(path: str | Path | None = None) -> Path:
    """Directory of the Fashion-MNIST IDX files: below `path` if given, else the Debian location, else the user cache.

    Raises `DataError` with one line that says how to get the files.
    """
    if path is not None:
        directory = _idx_directory(Path(os.path.expanduser(path)))
        if directory is None:
            raise DataError(f"{FASHION_MNIST_HELP} (no train-images-idx3-ubyte[.gz] below {path})")
        return directory
    for candidate in _IDX_SEARCH_PATH:
        directory = _idx_directory(Path(os.path.expanduser(candidate)))
        if directory is not None:
            return directory
    raise DataError(FASHION_MNIST_HELP)


def holds_idx_files(root: Path) -> bool:
    """Whether Fashion-MNIST's IDX files are in the folder or below it."""
    return _idx_directory(root) is not None


def _idx_directory(root: Path) -> Path | None:
    for sub in _IDX_SUBDIRS:
        if any(_idx_file(root / sub, prefix, "images-idx3") is not None for prefix in _IDX_PREFIX.values()):
            return root / sub
    return None


def _idx_file(directory: Path, prefix: str, kind: str) -> Path | None:
    for suffix in (".gz", ""):
        candidate = directory / f"{prefix}-{kind}-ubyte{suffix}"
        if candidate.is_file():
            return candidate
    return None


class FashionMNIST:
    """Fashion-MNIST (28×28 grey, 10 classes; 60 000 training and 10 000 test images), held in memory as uint8.

    Images are centred on a square of side `image_size` (default 32) and repeated over 3 channels. The border is filled
    with 0, the background of the originals, so background and border are both exactly −1.
    """

    name = "fashion-mnist"
    class_names = FASHION_MNIST_CLASSES
    broken: Mapping[int, str] = MappingProxyType({})

    def __init__(self, path: str | Path | None = None, split: str = "train", image_size: int = 32) -> None:
        if split not in _IDX_PREFIX:
            raise DataError(f"split: expected one of {sorted(_IDX_PREFIX)}, got {split!r}")
        directory = find_fashion_mnist(path)
        arrays = {}
        for kind in ("images-idx3", "labels-idx1"):
            file = _idx_file(directory, _IDX_PREFIX[split], kind)
            if file is None:
                raise DataError(f"{directory}: missing {_IDX_PREFIX[split]}-{kind}-ubyte[.gz]")
            arrays[kind] = read_idx(file)
        pixels, labels = arrays["images-idx3"], arrays["labels-idx1"]
        _check_idx_pair(directory, pixels, labels, image_size)
        before = [(image_size - side) // 2 for side in pixels.shape[1:]]
        after = [image_size - side - b for side, b in zip(pixels.shape[1:], before, strict=True)]
        padded = np.pad(pixels, ((0, 0), (before[0], after[0]), (before[1], after[1])))
        self.pixels = torch.from_numpy(padded)  # (N, S, S) uint8
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32 in [-1, 1] and labels (B,) at `indices`, without augmentation.

        `generator` is not used. Images are not flipped or shifted: every shoe of Fashion-MNIST points left, and a model
        should learn that.
        """
        grey = to_unit_range(self.pixels[indices]).unsqueeze(1)  # (B, 1, S, S)
        return grey.expand(-1, 3, -1, -1).contiguous(), self.labels[indices]

    def fingerprint(self) -> str:
        """A hash of all pixels and labels."""
        digest = hashlib.sha256(f"{tuple(self.pixels.shape)}".encode())
        digest.update(self.pixels.numpy())
        digest.update(self.labels.numpy())
        return digest.hexdigest()[:16]

    def remarks(self) -> list[str]:
        """Nothing is ever left out of this data set."""
        return []


def _check_idx_pair(directory: Path, pixels: np.ndarray, labels: np.ndarray, image_size: int) -> None:
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise DataError(f"{directory}: images: expected uint8 of rank 3, got {pixels.dtype} of shape {pixels.shape}")
    if labels.ndim != 1 or labels.dtype != np.uint8:
        raise DataError(f"{directory}: labels: expected uint8 of rank 1, got {labels.dtype} of shape {labels.shape}")
    if len(pixels) != len(labels):
        raise DataError(f"{directory}: {len(pixels)} images but {len(labels)} labels: expected equal counts")
    if len(pixels) == 0:
        raise DataError(f"{directory}: the data set is empty")
    if max(pixels.shape[1:]) > image_size:
        expected = f"at least {max(pixels.shape[1:])} to hold the images"
        raise DataError(f"image_size: expected {expected}, got {image_size} (a model's is its last patch_nums times "
                        "2^(number of ch_mult - 1))")
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(f"{directory}: labels: expected 0..{len(FASHION_MNIST_CLASSES) - 1}, got {labels.max()}")
