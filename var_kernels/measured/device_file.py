"""What was measured on one kind of GPU: a JSON file in the cache directory, beside the compiled kernels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..native.build import cache_root, write_atomically


def path_of(what: str, device: str) -> Path:
    """The file about `what` for GPUs of this name."""
    return cache_root() / f"{what}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read_text(what: str, device: str) -> str | None:
    """What the file holds; None where there is none, or it cannot be read."""
    try:
        return path_of(what, device).read_text()
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return None


def replace(what: str, device: str, content: Any) -> Path:
    """Replaces the file, whole or not at all, and returns its path."""
    path = path_of(what, device)
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=1)))
    return path
