"""Reads and writes the JSON file of measurements on one kind of GPU, in the cache directory of the compiled kernels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..native.build import cache_root, write_atomically


def path_of(what: str, device: str) -> Path:
    """The path of the file with measurements of `what` on GPUs of this name."""
    return cache_root() / f"{what}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read_text(what: str, device: str) -> str | None:
    """The text of the file; None if there is no such file, or it cannot be read."""
    try:
        return path_of(what, device).read_text()
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return None


def replace(what: str, device: str, content: Any) -> Path:
    """Replaces the file, completely or not at all, and returns its path."""
    path = path_of(what, device)
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=1)))
    return path
