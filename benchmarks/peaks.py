"""What this machine can do at most, measured in the same session as the kernels that are compared with it."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from var_kernels import _build

_SOURCE = Path(__file__).with_name("peaks.cpp")
_BEYOND_CACHE = 256 << 20  # bytes read; twice this in flight is larger than any last-level cache of a desktop


@dataclass(frozen=True)
class Peak:
    """A limit: `value` in GFLOP/s or GB/s, and what was run to find it."""

    value: float
    how: str


class Peaks:
    """Limits of this machine with torch's current number of threads; each is measured at its first use."""

    def __init__(self) -> None:
        self._found: dict[str, Peak] = {}
        self._copies: dict[int, Peak] = {}

    def get(self, name: str, copied_bytes: int = 0) -> Peak:
        """`name` is "fp32" or "bf16" (GFLOP/s), or "copy" (GB/s, read plus written) of `copied_bytes` in all.

        A copy of the same size as the kernel's traffic has the same share of it in caches, so that a share of the peak
        means the same for small and for large tensors.
        """
        if name == "copy":
            size = copied_bytes // 2 or _BEYOND_CACHE
            if size not in self._copies:
                self._copies[size] = Peak(_copy_rate(size), f"torch copy_ of {size / 1e6:.3g} MB")
            return self._copies[size]
        if not self._found:
            self._found = _arithmetic_peaks(torch.get_num_threads())
        return self._found[name]

    def as_dict(self) -> dict[str, dict]:
        """All limits, the copy beyond the caches among them."""
        named = {name: self.get(name) for name in ("fp32", "bf16", "copy")}
        return {name: {"value": peak.value, "how": peak.how} for name, peak in named.items()}

    def lines(self) -> list[str]:
        """The limits in words."""
        fp32, bf16, copy = (self.get(name) for name in ("fp32", "bf16", "copy"))
        return [
            f"fp32 {fp32.value:.0f} GFLOP/s ({fp32.how})",
            f"bf16 {bf16.value:.0f} GFLOP/s ({bf16.how})",
            f"copy {copy.value:.1f} GB/s ({copy.how})",
        ]


def _arithmetic_peaks(threads: int) -> dict[str, Peak]:
    try:
        library = _compile()
    except (_build.BuildUnavailable, subprocess.CalledProcessError, OSError):
        # Without a compiler the best matrix product of torch stands in: a lower bound of the limit, and named so.
        return {
            "fp32": Peak(_matmul_rate(torch.float32), "torch matmul; no compiler for a register loop"),
            "bf16": Peak(_matmul_rate(torch.bfloat16), "torch matmul; no compiler for a register loop"),
        }
    fp32 = Peak(library.peak_fp32(threads), f"register loop of multiply-adds, {threads} threads")
    rate = library.peak_bf16(threads)
    if rate:
        return {"fp32": fp32, "bf16": Peak(rate, f"register loop of dot products, {threads} threads")}
    return {"fp32": fp32, "bf16": Peak(fp32.value, "fp32 peak: no bf16 dot product on this machine")}


def _compile() -> ctypes.CDLL:
    compiler = _build.find_compiler()
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "peaks.so"
        flags = "-O3 -march=native -ffp-contract=fast -std=c++17 -fPIC -shared -pthread"
        command = [*shlex.split(compiler.command), *flags.split(), str(_SOURCE), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True)
        loaded = ctypes.CDLL(str(library))
    for function in (loaded.peak_fp32, loaded.peak_bf16):
        function.argtypes, function.restype = [ctypes.c_int], ctypes.c_double
    return loaded


def _best_seconds(function, calls: int) -> float:
    function()
    best = float("inf")
    for _ in range(calls):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def _matmul_rate(dtype: torch.dtype, size: int = 1536) -> float:
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), 10) / 1e9


def _copy_rate(size: int) -> float:
    source, target = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    calls = max(5, min(500, (1 << 31) // max(size, 1)))
    return 2 * size / _best_seconds(lambda: target.copy_(source), calls) / 1e9
