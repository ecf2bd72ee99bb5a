"""The configurations measured on one kind of GPU: a file that `triton/tune.py` writes and `triton/configs.py` reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import device_file

_FIELDS = {"tiles": dict, "num_warps": int, "num_stages": int, "options": dict, "table": str}


class Key(NamedTuple):
    """The entry of the table in `triton/configs.py` that a measured configuration replaces.

    It is that of the kernel "<stem>.<function>" for elements of `itemsize` bytes, in the row for problems up to `size`.
    """

    kernel: str
    size: int
    itemsize: int


def read(device: str) -> dict[Key, dict[str, Any]]:
    """The fields of each configuration; empty if nothing was measured, or the file cannot be read.

    Raises ValueError for a file that :func:`write` did not write.
    """
    text = device_file.read_text("tuned", device)
    if text is None:
        return {}
    path = device_file.path_of("tuned", device)
    try:
        entries = json.loads(text)["configs"]
        found = {Key(e["kernel"], e["size"], e["itemsize"]): {f: e[f] for f in _FIELDS} for e in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected what `python -m var_kernels.triton.tune` writes, got {error!r}; delete or rewrite it"
        ) from None
    for key, values in found.items():
        for name, kind in _FIELDS.items():
            if not isinstance(values[name], kind):
                raise ValueError(f"{path}: {key.kernel}: {name}: expected {kind.__name__}, got {values[name]!r}")
    return found


def write(device: str, configs: Mapping[Key, Mapping[str, Any]]) -> Path:
    """Replaces the file of this GPU, completely or not at all, and returns its path."""
    entries = [{**key._asdict(), **values} for key, values in sorted(configs.items())]
    return device_file.replace("tuned", device, {"device": device, "configs": entries})
