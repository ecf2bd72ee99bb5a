"""Data sets of images by class: Fashion-MNIST from its IDX files, or any folder with one sub-folder per class.

The training loops use the same interface of every data set, `ImageData`: ``len(data)``, ``data.labels`` (N,) int64,
and ``data.batch(indices, generator=None) -> (images, labels)`` with images (B, 3, S, S) float32 in [-1, 1], besides its
names. Which images form a batch is a pure function of (seed, step), see `batch_indices`, so a resumed training needs to
know nothing but its step number.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

# Where the IDX files can be in a directory that the user names: in the directory itself, or below it, if the Debian
# package was extracted there.
_IDX_SUBDIRS = ("", "usr/share/datasets/fashion-mnist", "share/datasets/fashion-mnist", "fashion-mnist")
_IDX_SEARCH_PATH = (Path("/usr/share/datasets/fashion-mnist"), Path("~/.cache/var/fashion-mnist"))
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

# What Pillow's decoders raise for files that are missing or broken.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})

FASHION_MNIST_HELP = (
    "data: Fashion-MNIST not found: `apt-get install dataset-fashion-mnist`, or without root `apt-get download "
    "dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb DIR` and pass DIR as the data folder"
)


class DataError(ValueError):
    """A data set is missing, malformed or empty. The message names the file or directory and what was expected."""


class ImageData(Protocol):
    """The interface of a data set that the training loops use."""

    name: str
    class_names: tuple[str, ...]
    labels: Tensor  # (N,) int64

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]: ...


# --------------------------------------------------------------------------------------------------------- IDX files


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
        raise DataError(f"image_size: expected at least {max(pixels.shape[1:])} to hold the images, got {image_size}")
    if labels.max() >= len(FASHION_MNIST_CLASSES):
        raise DataError(f"{directory}: labels: expected 0..{len(FASHION_MNIST_CLASSES) - 1}, got {labels.max()}")


# ----------------------------------------------------------------------------------------------------- image folders


class ImageFolder:
    """The images `root/<class name>/**/*.{png,jpg,…}`. Class indices follow the sorted class names.

    An image is converted to RGB (transparency over white), and its shorter side is resized to `image_size` (with
    `random_crop` to ``round(1.125·image_size)``). Then a square is cut out. If `batch` gets a generator, `random_crop`
    cuts it at a random place, and `flip` mirrors it with probability ½. Otherwise it is the centre, not mirrored.

    The constructor reads the headers of all files, so a file that is no image is reported at once. A truncated file is
    reported by name when it is decoded. Resized images stay in memory as uint8, up to `cache_bytes`.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        *,
        random_crop: bool = False,
        flip: bool = False,
        cache_bytes: int = 2 << 30,
    ) -> None:
        root = Path(os.path.expanduser(root))
        if not root.is_dir():
            raise DataError(f"{root}: not a directory: expected ROOT/<class name>/*.png|jpg|…")
        if image_size < 1:
            raise DataError(f"image_size: expected a positive number of pixels, got {image_size}")
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not classes:
            raise DataError(f"{root}: no class directories: expected ROOT/<class name>/*.png|jpg|…")
        files = [_image_files(root / name) for name in classes]
        empty = [name for name, found in zip(classes, files, strict=True) if not found]
        if empty:
            raise DataError(f"{root}: no images of class {', '.join(empty)}: expected *.png|jpg|… in each directory")
        self.name = root.name
        self.class_names = tuple(classes)
        self.paths = [path for found in files for path in found]
        self.labels = torch.tensor([i for i, found in enumerate(files) for _ in found], dtype=torch.int64)
        self.image_size, self.random_crop, self.flip = image_size, random_crop, flip
        self._resized_side = round(1.125 * image_size) if random_crop else image_size
        self._cache: dict[int, np.ndarray] = {}
        self._cache_left = cache_bytes
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="decode")
        list(self._pool.map(_check_header, self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32 in [-1, 1] and labels (B,). With `generator` they are augmented reproducibly."""
        images = list(self._pool.map(self._resized, indices.tolist()))
        size = self.image_size
        cropped = np.empty((len(images), size, size, 3), np.uint8)
        for row, image in enumerate(images):
            free_y, free_x = image.shape[0] - size, image.shape[1] - size
            y, x, mirrored = free_y // 2, free_x // 2, False
            if generator is not None:
                # Always draw three numbers, so that one option does not change the numbers of the other option.
                u = torch.rand(3, generator=generator).tolist()
                if self.random_crop:
                    y, x = int(u[0] * (free_y + 1)), int(u[1] * (free_x + 1))
                mirrored = self.flip and u[2] < 0.5
            crop = image[y : y + size, x : x + size]
            cropped[row] = crop[:, ::-1] if mirrored else crop
        return to_unit_range(torch.from_numpy(cropped).permute(0, 3, 1, 2)).contiguous(), self.labels[indices]

    def _resized(self, index: int) -> np.ndarray:
        """Image `index` as (h, w, 3) uint8, its shorter side resized."""
        cached = self._cache.get(index)
        if cached is None:
            cached = load_resized(self.paths[index], self._resized_side)
            if cached.nbytes <= self._cache_left:
                self._cache[index] = cached
                self._cache_left -= cached.nbytes
        return cached


def _image_files(directory: Path) -> list[Path]:
    return sorted(
        path
        for path in directory.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _check_header(path: Path) -> None:
    try:
        with Image.open(path):
            pass
    except _UNREADABLE as error:
        raise DataError(f"{path}: not a readable image: {error}") from error


def load_resized(path: Path, shorter_side: int) -> np.ndarray:
    """The image of a file as (h, w, 3) uint8 RGB, resized so that the shorter side has `shorter_side` pixels.

    Transparent pixels are laid over white, and 16-bit grey is scaled to 8 bits. Raises DataError, naming `path`, if the
    file is no complete image.
    """
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * shorter_side, 2 * shorter_side))
            rgb = _to_rgb(image)
    except _UNREADABLE as error:
        raise DataError(f"{path}: not a readable image: {error}") from error
    factor = shorter_side / min(rgb.size)
    size = tuple(max(shorter_side, round(side * factor)) for side in rgb.size)
    return np.asarray(rgb.resize(size, Image.Resampling.LANCZOS), np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion of 16-bit grey clips at 255 instead of scaling.
        return Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


# --------------------------------------------------------------------------------------------- choosing and ordering


def open_dataset(
    path: str | Path | None = None,
    split: str = "train",
    image_size: int = 32,
    *,
    random_crop: bool = False,
    flip: bool = False,
) -> ImageData:
    """Data set at `path`: Fashion-MNIST if `path` is None or holds its IDX files, else a folder of images by class.

    If a folder has sub-folders ``train`` and ``test`` (or ``val``), they are its splits. Any other folder serves as
    both splits. `random_crop` and `flip` apply to the training split of folders.
    """
    if path is None:
        return FashionMNIST(None, split, image_size)
    root = Path(os.path.expanduser(path))
    if not root.is_dir():
        raise DataError(f"{root}: not a directory: expected Fashion-MNIST's IDX files or ROOT/<class name>/*.png|jpg|…")
    if _idx_directory(root) is not None:
        return FashionMNIST(root, split, image_size)
    if (root / "train").is_dir() and any((root / name).is_dir() for name in ("test", "val")):
        parts = {"train": ("train",), "test": ("test", "val")}[split]
        root = next(root / name for name in parts if (root / name).is_dir())
    training = split == "train"
    return ImageFolder(root, image_size, random_crop=random_crop and training, flip=flip and training)


def describe(data: ImageData) -> str:
    """Name and size of a data set, for messages and metadata."""
    return f"{data.name}, {len(data)} images of {len(data.class_names)} classes"


def to_unit_range(pixels: Tensor) -> Tensor:
    """Converts uint8 0..255 to float32 in [-1, 1]. 0 becomes exactly −1 and 255 exactly 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Converts [-1, 1] to uint8 0..255 by rounding; values outside are clamped. The inverse of `to_unit_range`."""
    return images.detach().to(torch.float32).add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def split_indices(count: int, held_out: int) -> tuple[Tensor, Tensor]:
    """Indices (training, held-out) of one fixed shuffle, so that runs with different seeds can be compared."""
    if not 0 <= held_out < count:
        raise DataError(f"held_out: expected 0..{count - 1} of {count} images, got {held_out}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[held_out:], order[:held_out]


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Generator for one use, numbered `stream`, in training step `step`.

    It depends on its arguments only, so a resumed training draws the same numbers.
    """
    words = np.random.SeedSequence([seed, step, stream]).generate_state(2, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))


def batch_indices(pool: Tensor | Sequence[int], batch_size: int, seed: int, step: int) -> Tensor:
    """Members of `pool` that form the batch of `step`.

    Each epoch is a shuffle that depends on (seed, epoch). It is cut into whole batches, and the rest is left out.
    """
    pool = torch.as_tensor(pool)
    if not 1 <= batch_size <= len(pool):
        raise DataError(f"batch_size: expected 1..{len(pool)} (the number of training images), got {batch_size}")
    per_epoch = len(pool) // batch_size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(len(pool), generator=step_generator(seed, epoch, stream=1))
    return pool[order[position * batch_size : (position + 1) * batch_size]]
