"""The one function that starts every Triton kernel.

A launch is data: kernel, grid, arguments, options. On a GPU it is run at once. Inside :func:`executor` it is given to a
function instead, which may compile it for a GPU that is not present (:mod:`.offline`), execute the compiled code on the
CPU, or only record it. So reports and tests see exactly what a user's call launches.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: `arguments` holds every parameter of it by name, constexpr ones included."""

    kernel: Any  # a triton.JITFunction
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int
    options: Mapping[str, Any] = field(default_factory=dict)  # more options of the compiler, for one API only

    @property
    def name(self) -> str:
        """`<stem>.<function>`, as the tables and reports call it."""
        return f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__}"

    def keywords(self) -> dict[str, Any]:
        """What `kernel[grid](...)` takes."""
        # A product and a sum may be contracted to one fma, as in the other compilers of this project. It is set here,
        # because Triton's default has changed between versions.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return {**self.arguments, **options, **self.options}


Executor = Callable[[Launch], None]
_executor: contextvars.ContextVar[Executor | None] = contextvars.ContextVar("executor", default=None)


@contextlib.contextmanager
def executor(function: Executor) -> Iterator[None]:
    """Launches inside this context go to `function` instead of the GPU. They may be on CPU tensors."""
    token = _executor.set(function)
    try:
        yield
    finally:
        _executor.reset(token)


def has_executor() -> bool:
    """Whether launches go to an executor instead of the GPU."""
    return _executor.get() is not None


def launch(kernel, grid: tuple[int, ...], arguments: Mapping[str, Any], config) -> None:
    """Starts `kernel` on `grid` with `arguments` and the tiles and options of `config`, on the arguments' device."""
    arguments = {**arguments, **config.tiles}
    request = Launch(kernel, grid, arguments, config.num_warps, config.num_stages, config.options)
    if (function := _executor.get()) is not None:
        function(request)
        return
    device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
    with torch.cuda.device(device):
        kernel[grid](**request.keywords())
