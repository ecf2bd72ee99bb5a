"""Reads and writes the JSON file of measurements on one kind of GPU, in the cache directory of the compiled kernels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._only_writer import only_writer
from ..native.build import write_atomically
from ..native.cache import cache_root


def path_of(what: str, device: str) -> Path:
    """The path of the file with measurements of `what` on GPUs of this name."""
    return cache_root() / f"{what}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read_text(what: str, device: str) -> str | None:
    """The text of the file; None if there is no such file, or it cannot be read."""
    try:
        return path_of(what, device).read_text()
    except OSError:
        return None


@contextmanager
def only_measuring(what: str, device: str) -> Iterator[None]:
    """Keeps other processes from measuring the same until the file is replaced. Raises BlockingIOError if one does."""
    with only_writer(_prepared(path_of(what, device))):
        yield


def replace(what: str, device: str, content: Any) -> Path:
    """Replaces the file, completely or not at all, and returns its path."""
    path = _prepared(path_of(what, device))
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=1)))
    return path


def _prepared(path: Path) -> Path:
    """`path`, whose directory is there. No other user can write to it, because compiled libraries are in it, too."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
