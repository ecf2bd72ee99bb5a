"""Any folder with one sub-folder of images per class, as a data set."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import images
from .interface import DataError, to_unit_range

_T, _R = TypeVar("_T"), TypeVar("_R")

EXPECTED = "ROOT/<class name>/*.png|jpg|…"
# Folders and files that systems and archivers leave behind. They hold no images of the user, but some hold thumbnails.
_SYSTEM_NAMES = frozenset({"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"})
_OUTSIDE = "outside of the class folders"
_LARGER_SIDE = 1.125  # of the resized image from which a random square is cut, in multiples of the square
_LONGEST = 4  # an image whose sides have a larger ratio is never resized as a whole
_SAMPLE = 4096  # bytes at the start and at the end of a file that its fingerprint contains
_NAMED = 5  # broken images that a remark names


class ImageFolder:
    """The images `root/<class name>/**/*.{png,jpg,…}`. Class indices follow the class names in natural order.

    Every file that Pillow can decode is read. Hidden files and folders, those that systems leave behind (__MACOSX) and
    files of other kinds are left out, and `remarks` counts them.

    An image is turned upright as its EXIF data say and converted to RGB (transparency over white), and its shorter side
    is resized to `image_size` (with `random_crop` to ``round(1.125·image_size)``). Then a square is cut out. If `batch`
    gets a generator, `random_crop` cuts it at a random place, and `flip` mirrors it with probability ½. Otherwise it is
    the centre, not mirrored.

    The constructor reads the headers of all files, so a file that is no image is reported at once. A truncated file is
    reported by name when it is decoded. With `skip_broken` neither is an error: a broken image keeps its place in the
    order of the images, and the next readable image of its class, in this order and after the last one from the start,
    takes it. So which images form a batch does not depend on when an image is found to be broken. `broken` holds what
    was found so far.

    Resized images stay in memory as uint8, up to `cache_bytes`; a copy for another process does not take them along.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int,
        *,
        random_crop: bool = False,
        flip: bool = False,
        skip_broken: bool = False,
        cache_bytes: int = 2 << 30,
    ) -> None:
        root = Path(os.path.expanduser(root))
        if not root.is_dir():
            raise DataError(f"{root}: not a directory: expected {EXPECTED}")
        if image_size < 1:
            raise DataError(f"image_size: expected a positive number of pixels, got {image_size}")
        self.name, self.root = root.name, root
        self.image_size, self.random_crop, self.flip, self.skip_broken = image_size, random_crop, flip, skip_broken
        self._shorter_side = round(_LARGER_SIDE * image_size) if random_crop else image_size
        self._cache_bytes = cache_bytes
        self._forget()
        self._left_out: Counter[str] = Counter()
        files = self._find()
        self.class_names = tuple(files)
        self.paths = [path for found in files.values() for path in found]
        counts = [len(found) for found in files.values()]
        self.labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self._starts = list(itertools.accumulate(counts, initial=0))  # the images of a class follow one another
        self.broken: dict[int, str] = {}
        _map_in_threads(self._check, range(len(self.paths)))

    def _find(self) -> dict[str, list[Path]]:
        """The files of each class, in the order of the classes."""
        root, classes = self.root, []
        for entry in root.iterdir():
            if not _is_left_out(entry.name, self._left_out):
                if entry.is_dir():
                    classes.append(entry.name)
                else:
                    self._left_out[_OUTSIDE] += 1
        if not classes:
            raise DataError(f"{root}: no class directories: expected {EXPECTED}{self._left_out_text()}")
        suffixes = images.image_suffixes()
        files = {name: _image_files(root / name, suffixes, self._left_out) for name in sorted(classes, key=natural_key)}
        empty = [name for name, found in files.items() if not found]
        if empty:
            expected = f"expected *.png|jpg|… in each directory{self._left_out_text()}"
            raise DataError(f"{root}: no images of class {', '.join(empty)}: {expected}")
        return files

    def _check(self, index: int) -> None:
        try:
            images.check_header(self.paths[index])
        except DataError as error:
            self._skip(index, error)

    def _skip(self, index: int, error: DataError) -> None:
        if not self.skip_broken:
            raise error
        self.broken[index] = str(error)

    def __len__(self) -> int:
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": {}, "_cache_left": self._cache_bytes}

    def _forget(self) -> None:
        self._cache: dict[int, np.ndarray] = {}
        self._cache_left = self._cache_bytes

    # --------------------------------------------------------------------------------------------------------- batches

    def batch(self, indices: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32 in [-1, 1] and labels (B,). With `generator` they are augmented reproducibly."""
        wanted = indices.tolist()
        # Always draw three numbers, so that one option does not change the numbers of the other option.
        draws = [None if generator is None else torch.rand(3, generator=generator).tolist() for _ in wanted]
        produce = map if all(index in self._cache for index in wanted) else _map_in_threads
        produced = list(produce(self._square, wanted, draws))
        for index, (_, kept) in zip(wanted, produced, strict=True):
            if kept is not None and index not in self._cache and kept.nbytes <= self._cache_left:
                self._cache[index] = kept
                self._cache_left -= kept.nbytes
        shape = (len(wanted), self.image_size, self.image_size, 3)
        squares = np.array([square for square, _ in produced], np.uint8).reshape(shape)
        return to_unit_range(torch.from_numpy(squares).permute(0, 3, 1, 2)).contiguous(), self.labels[indices]

    def _square(self, index: int, draws: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray | None]:
        """The square (S, S, 3) of image `index`, and what to keep in memory of the image."""
        picture = self._cache.get(index)
        if picture is None:
            picture = self._load(index)
        size, long = self.image_size, isinstance(picture, Image.Image)
        width, height = images.resized_size(picture.size, self._shorter_side) if long else picture.shape[1::-1]
        free_x, free_y = width - size, height - size
        x, y, mirrored = free_x // 2, free_y // 2, False
        if draws is not None:
            if self.random_crop:
                y, x = int(draws[0] * (free_y + 1)), int(draws[1] * (free_x + 1))
            mirrored = self.flip and draws[2] < 0.5
        if long:
            square, kept = images.square(picture, self._shorter_side, size, (x, y)), None
        else:
            square, kept = picture[y : y + size, x : x + size], picture
        return (square[:, ::-1] if mirrored else square), kept

    def _load(self, index: int) -> np.ndarray | Image.Image:
        """The part of image `index` from which squares are cut: (h, w, 3) uint8, resized. A long image stays as it is.

        An image that is broken is replaced, if `skip_broken` allows it.
        """
        for candidate in self._candidates(index):
            try:
                rgb = images.decode(self.paths[candidate], self._shorter_side).rgb
            except DataError as error:
                self._skip(candidate, error)
                continue
            if not self.random_crop:
                return images.square(rgb, self._shorter_side, self.image_size)
            return rgb if max(rgb.size) > _LONGEST * min(rgb.size) else images.resized(rgb, self._shorter_side)
        raise DataError(f"{self.root}: no readable image of class {self.class_names[self.labels[index]]}")

    def _candidates(self, index: int) -> Iterable[int]:
        """Image `index`, and after it those that can take its place."""
        label = int(self.labels[index])
        members = itertools.chain(range(index, self._starts[label + 1]), range(self._starts[label], index))
        return (member for member in members if member not in self.broken)

    # -------------------------------------------------------------------------------------------- what the files are

    def fingerprint(self) -> str:
        """A hash of the paths of all files below the root, in their order, their sizes and times, and both their ends.

        It reads the files anew, so it forgets the images in memory.
        """
        self._forget()
        digest = hashlib.sha256()
        for path, identity in zip(self.paths, _map_in_threads(_identity, self.paths), strict=True):
            digest.update(os.fsencode(path.relative_to(self.root)) + b"\0" + identity)
        return digest.hexdigest()[:16]

    def remarks(self) -> list[str]:
        """How many files are left out, and which images were found to be broken so far."""
        lines = [f"{self.root}{self._left_out_text()}"] if self._left_out else []
        if self.broken:
            found = [str(self.paths[index]) for index in sorted(self.broken)]
            named = ", ".join(found[:_NAMED]) + (", …" if len(found) > _NAMED else "")
            lines.append(f"{self.root}: {len(found)} broken of {len(self)} images, in whose places the next images of "
                         f"their classes are used: {named}")
        return lines

    def _left_out_text(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._left_out.most_common())
        return f"; left out: {kinds}" if kinds else ""


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts names with numbers as people do: "class 2" comes before "class 10"."""
    parts: list[str | int] = list(re.split(r"(\d+)", name))
    parts[1::2] = map(int, parts[1::2])
    return parts, name  # "01" and "1" are the same number, but not the same name


def _image_files(folder: Path, suffixes: frozenset[str], left_out: Counter[str]) -> list[Path]:
    """The files below `folder` that have one of the suffixes, sorted. The others are counted in `left_out` by kind."""
    found = []
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not _is_left_out(name, left_out)]
        # os.walk does not go into links, which could lead round in a circle.
        left_out.update("linked folders" for name in folders if os.path.islink(os.path.join(place, name)))
        for name in names:
            path = Path(place, name)
            if _is_left_out(name, left_out):
                continue
            if path.suffix.lower() not in suffixes:
                left_out[path.suffix.lower() or "without suffix"] += 1
            elif not path.is_file():
                left_out["broken links or devices"] += 1
            else:
                found.append(path)
    return sorted(found)


def _is_left_out(name: str, left_out: Counter[str]) -> bool:
    """Whether a file or folder is hidden or of the system. If so, it is counted."""
    kind = "hidden" if name.startswith(".") else name if name in _SYSTEM_NAMES else None
    if kind is not None:
        left_out[kind] += 1
    return kind is not None


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _identity(path: Path) -> bytes:
    """What tells a file from another one of the same name, without reading all of it."""
    try:
        status = path.stat()
        with path.open("rb") as file:
            ends = file.read(_SAMPLE)
            file.seek(max(len(ends), status.st_size - _SAMPLE))
            ends += file.read(_SAMPLE)
    except OSError as error:
        return str(error.strerror).encode()  # the file is named when it is decoded
    return f"{status.st_size} {status.st_mtime_ns} ".encode() + hashlib.sha256(ends).digest()


def _map_in_threads(function: Callable[..., _R], *arguments: Sequence[_T]) -> list[_R]:
    """``list(map(function, *arguments))`` in several threads, which exist only during the call.

    Threads that wait for work would be missing in a process that is forked from this one, so its first call would never
    return; and an object that holds them cannot be pickled.
    """
    workers = min(8, os.cpu_count() or 1, len(arguments[0]))
    if workers < 2:
        return list(map(function, *arguments))
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        return list(pool.map(function, *arguments))
