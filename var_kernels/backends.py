"""Which backend serves which op on which device: one table, and resolve() which returns a backend or raises.

`"auto"` takes the first backend in the table's order that can serve the call. A backend asked for by name is that
backend or an error: there is no silent fallback from a named backend.
"""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

OPS = ("block_causal_attention", "adaln_layer_norm", "gated_residual_adaln", "nearest_code", "multi_scale_quantize")

# In the order that "auto" tries them.
BACKENDS = ("cpu", "triton", "reference")
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda",), "reference": None}  # None: any device; "cuda" is AMD's name as well
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "reference": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


def _native_reason() -> str | None:
    from . import _native  # imported at the first op call: importing var_kernels loads and builds nothing

    status = _native.load()
    return None if status.available else f"the native library is not available: {status.reason}"


def _triton_reason() -> str | None:
    return _found_triton_reason()  # a plain function, as torch.compile wants it


@functools.cache
def _found_triton_reason() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "Triton's kernels need a GPU of compute capability 8.0 or newer"
    # Triton compiles a small C module at its first launch.
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang", "cc"))):
        return "Triton needs a C compiler, and there is none (install gcc, or set CC)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Triton needs the headers of Python, and there are none (install python3-dev)"
    return None


def _launches_elsewhere() -> bool:
    """Whether Triton launches are handed to a function instead of a GPU, see `triton/launch.py`."""
    launch = sys.modules.get(f"{__package__}.triton.launch")  # nobody can have said so without importing it
    return launch is not None and launch.has_executor()


# What torch.compiler.assume_constant_result does; calling it would import all of torch._dynamo, which takes seconds
# and edits the environment.
for _function in (_native_reason, _triton_reason, _launches_elsewhere):
    _function._dynamo_marked_constant = True


def unavailable_reason(backend: str, device_type: str, op: str) -> str | None:
    """Why `backend` cannot serve `op` on `device_type`; None if it can."""
    devices = _DEVICES[backend]
    if devices is not None and device_type not in devices:
        return f"runs on {', '.join(devices)} tensors only"
    if backend == "cpu":
        return _native_reason()
    return _triton_reason() if backend == "triton" else None


def resolve(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend that serves this call.

    Raises ValueError if `backend` is unknown, or names one that cannot serve `op` on this device and dtype.
    """
    if backend == "auto":
        for name in BACKENDS:
            if dtype in _DTYPES[name] and unavailable_reason(name, device_type, op) is None:
                return name
        raise ValueError(f"{op}: no backend serves {dtype} on {device_type}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = unavailable_reason(backend, device_type, op)
    if reason is not None and backend == "triton" and _launches_elsewhere():
        reason = None
    if reason is None and dtype not in _DTYPES[backend]:
        reason = f"does not take {dtype}"
    if reason is not None:
        serving = [name for name in BACKENDS
                   if dtype in _DTYPES[name] and unavailable_reason(name, device_type, op) is None]
        raise ValueError(
            f"backend: {backend!r} cannot serve {op} on {device_type} with {dtype}: {reason}; "
            f"expected one of auto, {', '.join(serving)}"
        )
    return backend
