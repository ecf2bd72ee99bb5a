"""The clocks that time a call: wall-clock seconds on the CPU, seconds between events on a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from var_kernels.testing import GPU_CACHE_BYTES, gpu_seconds


class CpuClock:
    """Times calls on the CPU. Inputs stay where they are, and may be in the caches."""

    device = "cpu"

    def place(self, inputs: Any) -> Any:
        """The inputs on the device of this clock."""
        return inputs

    def seconds(self, call: Callable[[], Any]) -> float:
        """Wall-clock seconds of one call, without garbage collection, as pytest-benchmark times the provider."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        finally:
            if collecting:
                gc.enable()


class CudaClock:
    """Times calls by events on the current stream, after a write that evicts the inputs from the L2 cache.

    The write also keeps the GPU busy while the host launches the call. This hides the launch cost of the first kernel;
    the launch cost of later kernels counts if the host is slower than the kernels, as it does for users.
    """

    device = "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(GPU_CACHE_BYTES, dtype=torch.uint8, device=self.device)

    def place(self, inputs: Any) -> Any:
        """The inputs on the device of this clock, leaves that require gradients as before."""
        return tree_map_only(
            torch.Tensor, lambda t: t.detach().to(self.device).requires_grad_(t.requires_grad), inputs
        )

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of one call on the GPU."""
        return gpu_seconds(call, self._flush)


Clock = CpuClock | CudaClock


def clock_for(device: str) -> Clock:
    """The clock of "cpu" or "cuda"."""
    return CpuClock() if device == "cpu" else CudaClock()
