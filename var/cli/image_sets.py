"""Writes generated images to a sheet, a folder of PNG files or one .npz file.

The folder and the .npz file keep finished images after an interruption: every image is written as soon as it is
generated, into its own PNG file, or into a file of records beside the future .npz file. A later run of the same request
finds these images and generates the others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from var_kernels.native.build import write_atomically

from ..data.interface import to_uint8
from ..data.pictures import grid_by_label, to_pictures, write_png
from ..generation.batches import Batch

_COPY_BYTES = 1 << 24


class Sheet:
    """One picture of all images with the names of their classes. It is written at the end, so an interruption loses all
    images."""

    done: frozenset[int] = frozenset()

    def __init__(self, path: Path, labels: Sequence[int], class_names: Sequence[str], description: str) -> None:
        self.path, self._labels, self._names, self._description = path, labels, class_names, description

    def write(self, batches: Iterator[Batch]) -> None:
        images = torch.cat([batch.images for batch in batches])
        write_png(self.path, grid_by_label(images, self._labels, self._names), self._description)

    def finished(self) -> int:
        """How many images an interruption now would not lose."""
        return 0


class Folder:
    """One PNG file for each image, named after its number and class. The PNG text describes the request."""

    def __init__(self, path: Path, labels: Sequence[int], class_names: Sequence[str], description: str) -> None:
        self.path, self._labels, self._names, self._description = path, labels, class_names, description
        self._digits = max(3, len(str(len(labels) - 1)))
        self.done = frozenset(number for number in range(len(labels)) if self._is_there(number))
        self._written = len(self.done)

    def _file(self, number: int) -> Path:
        return self.path / f"{number:0{self._digits}d}-{file_stem(self._names[self._labels[number]])}.png"

    def _text(self, number: int) -> str:
        # The name of the file does not identify the class: ImageNet has two classes "crane".
        return f"{self._description}, class {self._labels[number]}"

    def _is_there(self, number: int) -> bool:
        try:
            with Image.open(self._file(number)) as image:
                return image.info.get("Description") == self._text(number)
        except (FileNotFoundError, UnidentifiedImageError, NotADirectoryError):
            return False

    def write(self, batches: Iterator[Batch]) -> None:
        for batch in batches:
            for number, picture in zip(batch.numbers, to_pictures(batch.images), strict=True):
                write_png(self._file(number), picture, self._text(number))
                self._written += 1

    def finished(self) -> int:
        return self._written


class NpzFile:
    """One .npz file with ``arr_0`` (N, H, W, 3) uint8, which the ADM evaluator reads, and ``labels`` and ``tokens``.

    Images are collected in ``<name>.partial``: one line that describes the request, then one record for each image,
    with its pixels and tokens. When all images are there, the .npz file is written and the file of records is removed.
    """

    def __init__(
        self, path: Path, labels: Sequence[int], description: str, image_size: int, length: int
    ) -> None:
        self.path, self._labels = path, labels
        self._partial = path.with_name(path.name + ".partial")
        self._image_shape, self._length = (image_size, image_size, 3), length
        digest = hashlib.sha256(np.asarray(labels, dtype=np.int64).tobytes()).hexdigest()
        header = {"request": description, "labels": digest, "image": self._image_shape, "tokens": length}
        self._header = (json.dumps(header) + "\n").encode()
        self._pixels = image_size * image_size * 3
        self._record = self._pixels + 8 * length
        self.done = frozenset(range(self._count()))
        self._written = len(self.done)

    def _count(self) -> int:
        """Number of complete records, 0 if the file belongs to another request."""
        try:
            with self._partial.open("rb") as file:
                if file.read(len(self._header)) != self._header:
                    return 0
                return min(len(self._labels), (os.fstat(file.fileno()).st_size - len(self._header)) // self._record)
        except FileNotFoundError:
            return 0

    def write(self, batches: Iterator[Batch]) -> None:
        self._collect(batches)
        write_atomically(self.path, self._assemble)
        self._partial.unlink()

    def _collect(self, batches: Iterator[Batch]) -> None:
        file: IO[bytes] | None = None
        try:
            for batch in batches:
                if file is None:  # opened once there is an image, so that a request that fails leaves no file
                    file = self._open()
                pixels = to_uint8(batch.images).permute(0, 2, 3, 1).flatten(1).contiguous().numpy()
                tokens = batch.tokens.numpy().astype("<i8").view(np.uint8)
                file.write(np.concatenate((pixels, tokens), axis=1).tobytes())
                file.flush()
                self._written += len(batch.numbers)
        finally:
            if file is not None:
                file.close()

    def _open(self) -> IO[bytes]:
        if not self.done:
            file = self._partial.open("wb")
            file.write(self._header)
            return file
        file = self._partial.open("r+b")
        file.truncate(len(self._header) + len(self.done) * self._record)
        file.seek(0, os.SEEK_END)
        return file

    def _assemble(self, temporary: str) -> None:
        count, tokens = len(self._labels), np.empty((len(self._labels), self._length), dtype=np.int64)
        records_at_once = max(1, _COPY_BYTES // self._record)
        with self._partial.open("rb") as records, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            records.seek(len(self._header))
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self._image_shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for start in range(0, count, records_at_once):
                    rows = min(records_at_once, count - start)
                    block = np.frombuffer(records.read(rows * self._record), np.uint8).reshape(rows, self._record)
                    member.write(block[:, : self._pixels].tobytes())
                    tokens[start : start + rows] = np.ascontiguousarray(block[:, self._pixels :]).view("<i8")
            for name, array in (("labels", np.asarray(self._labels)), ("tokens", tokens)):
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    def finished(self) -> int:
        return self._written


ImageSet = Sheet | Folder | NpzFile


def image_set(
    output: Path, labels: Sequence[int], class_names: Sequence[str], description: str, image_size: int, length: int
) -> ImageSet:
    """The image set for the path `output`: a .npz file, one sheet as .png, or a folder of .png files."""
    if output.suffix.lower() == ".npz" and not output.is_dir():
        return NpzFile(output, labels, description, image_size, length)
    if output.suffix.lower() == ".png" and not output.is_dir():
        return Sheet(output, labels, class_names, description)
    return Folder(output, labels, class_names, description)


def file_stem(name: str) -> str:
    """A class name as part of a file name: in lower case, its words joined by hyphens."""
    return re.sub(r"\W+", "-", name.casefold()).strip("-") or "image"
