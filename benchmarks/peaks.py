"""The limits of this machine, measured in the same session as the kernels that are compared with them."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from var_kernels.native import build

from .clock import Clock, CpuClock

_SOURCE = Path(__file__).with_name("peaks.cpp")
_BEYOND_CACHE = 256 << 20  # bytes read; with the bytes written, this exceeds any last-level cache of a desktop


@dataclass(frozen=True)
class Peak:
    """A limit: `value` in GFLOP/s or GB/s, and `how` it was measured."""

    value: float
    how: str


class Peaks:
    """Limits of the CPU with torch's current number of threads, or of the GPU; each is measured at its first use."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = CpuClock() if clock is None else clock
        self._found: dict[str, Peak] = {}
        self._copies: dict[int, Peak] = {}

    def get(self, name: str, copied_bytes: int = 0) -> Peak:
        """The limit `name`: "fp32" or "bf16" (GFLOP/s), or "copy" (GB/s, read plus written) of `copied_bytes` in all.

        A copy of the same size as the traffic of a kernel has the same share of its data in caches. A share of this
        limit therefore means the same for small and for large tensors.
        """
        if name == "copy":
            size = copied_bytes // 2 or _BEYOND_CACHE
            if size not in self._copies:
                self._copies[size] = Peak(_copy_rate(size, self._clock), f"torch copy_ of {size / 1e6:.3g} MB")
            return self._copies[size]
        if not self._found:
            if self._clock.device == "cpu":
                self._found = _arithmetic_peaks(torch.get_num_threads())
            else:
                self._found = _matmul_peaks(self._clock, 8192, "torch matmul, 8192 cubed")
        return self._found[name]

    def as_dict(self) -> dict[str, dict]:
        """All limits by name; the copy is the one that exceeds the caches."""
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
    except (build.BuildUnavailable, subprocess.CalledProcessError, OSError):
        return _matmul_peaks(CpuClock(), 1536, "torch matmul; no compiler for a register loop")
    fp32 = Peak(library.peak_fp32(threads), f"register loop of multiply-adds, {threads} threads")
    rate = library.peak_bf16(threads)
    if rate:
        return {"fp32": fp32, "bf16": Peak(rate, f"register loop of dot products, {threads} threads")}
    return {"fp32": fp32, "bf16": Peak(fp32.value, "fp32 peak: no bf16 dot product on this machine")}


def _matmul_peaks(clock: Clock, size: int, how: str) -> dict[str, Peak]:
    """The rates of torch's own matrix product, with the caller's precision settings: lower bounds of the limits."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {name: Peak(_matmul_rate(dtype, size, clock), how) for name, dtype in dtypes.items()}


def _compile() -> ctypes.CDLL:
    compiler = build.find_compiler()
    with tempfile.TemporaryDirectory() as directory:
        library = Path(directory) / "peaks.so"
        flags = "-O3 -march=native -ffp-contract=fast -std=c++17 -fPIC -shared -pthread"
        command = [*shlex.split(compiler.command), *flags.split(), str(_SOURCE), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True)
        loaded = ctypes.CDLL(str(library))
    for function in (loaded.peak_fp32, loaded.peak_bf16):
        function.argtypes, function.restype = [ctypes.c_int], ctypes.c_double
    return loaded


def _best_seconds(function, calls: int, clock: Clock) -> float:
    function()
    return min(clock.seconds(function) for _ in range(calls))


def _matmul_rate(dtype: torch.dtype, size: int, clock: Clock) -> float:
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), 10, clock) / 1e9


def _copy_rate(size: int, clock: Clock) -> float:
    source, target = (torch.zeros(size, dtype=torch.uint8, device=clock.device) for _ in range(2))
    calls = max(5, min(500, (1 << 31) // max(size, 1)))
    return 2 * size / _best_seconds(lambda: target.copy_(source), calls, clock) / 1e9
