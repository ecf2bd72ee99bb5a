"""How fast each GPU backend runs each op on one kind of GPU: written by the benchmarks, read by `backends.py`.

``pytest benchmarks/ --benchmark-only --device cuda`` writes the file. Measurements count only if they were made with
the kernels, the torch and the Triton of this process. Deleting the file restores the shipped order.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from ..native import build
from . import device_file

MARGIN = 0.05  # a backend replaces the shipped first one only if it is faster by more than this fraction


class Speeds(NamedTuple):
    """The speed of each backend as a multiple of the baseline's: the geometric mean over `cases` cases of the op."""

    speeds: Mapping[str, float]
    cases: int

    def first(self, shipped: str) -> str:
        """The fastest backend, or `shipped` if none is faster than `shipped` by more than the margin."""
        fastest = max(self.speeds, key=self.speeds.get)
        return fastest if self.speeds[fastest] > (1 + MARGIN) * self.speeds[shipped] else shipped

    def __str__(self) -> str:
        return ", ".join(f"{name} {speed:.3g}×" for name, speed in self.speeds.items()) + f" ({self.cases} cases)"


def path_of(device: str) -> Path:
    """The path of the file with the results for GPUs of this name."""
    return device_file.path_of("backends", device)


def read(device: str, backends: Collection[str]) -> dict[str, Speeds]:
    """The results by op, with a speed for each of `backends`.

    Empty if nothing was measured with the present kernels, torch and Triton. Raises ValueError for a file that
    :func:`write` did not write.
    """
    text = device_file.read_text("backends", device)
    if text is None:
        return {}
    try:
        content = json.loads(text)
        found = {op: Speeds(dict(e["speeds"]), int(e["cases"])) for op, e in content["ops"].items()}
        measured_with = {name: content[name] for name in present()}
        for op, entry in found.items():
            if set(entry.speeds) != set(backends) or not all(0 < x < math.inf for x in entry.speeds.values()):
                raise ValueError(f"{op}: speeds {entry.speeds}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path_of(device)}: expected what `pytest benchmarks/ --benchmark-only --device cuda` writes, "
            f"got {error!r}; delete or rewrite it"
        ) from None
    return found if measured_with == present() else {}


def write(device: str, results: Mapping[str, Speeds]) -> Path:
    """Replaces the file of this GPU, completely or not at all, and returns its path."""
    ops = {op: {"speeds": dict(entry.speeds), "cases": entry.cases} for op, entry in results.items()}
    return device_file.replace("backends", device, {"device": device, **present(), "ops": ops})


@functools.cache
def present() -> dict[str, str | None]:
    """What a measurement depends on: a hash of the kernels' sources, and the versions of torch and Triton."""
    digest = hashlib.sha256(build.source_hash().encode())
    for path in sorted((build.PACKAGE / "triton").glob("*.py")):
        digest.update(path.read_bytes())
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {"sources": digest.hexdigest(), "torch": torch.__version__, "triton": triton}
