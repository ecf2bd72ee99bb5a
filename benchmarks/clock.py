"""How a call is timed on a device: wall-clock seconds on the CPU, seconds between events on a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

_FLUSH_BYTES = 512 << 20  # larger than the last cache of any GPU so far (B200: 126 MB, MI300X: 256 MB)


class CpuClock:
    """Inputs stay where they are, and warm."""

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
    """Events around the call on the current stream, after a write that evicts the inputs from the L2 cache.

    The write also keeps the GPU busy while the host launches what follows, so the launch cost of the first kernel is
    hidden, and that of later ones counts where the host is slower than the kernels, as it does for users.
    """

    device = "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def place(self, inputs: Any) -> Any:
        """The inputs on the device of this clock, leaves that require gradients as before."""
        return tree_map_only(
            torch.Tensor, lambda t: t.detach().to(self.device).requires_grad_(t.requires_grad), inputs
        )

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of one call on the GPU."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


Clock = CpuClock | CudaClock


def clock_for(device: str) -> Clock:
    """The clock of "cpu" or "cuda"."""
    return CpuClock() if device == "cpu" else CudaClock()
