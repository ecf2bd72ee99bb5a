"""Which backend serves which op on which device: one table, and `resolve`, which returns a backend or raises.

`"auto"` takes the first backend in the order of :data:`BACKENDS` that can serve the call; on a GPU each op has its own
first one, see :data:`GPU_ORDER`. A backend that is asked for by name serves the call or raises: a named backend is
never replaced by another.
"""

import ctypes
import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from .inference import packing
from .measured import speeds
from .native import library, load

GPU_OPS = (
    "block_causal_attention", "adaln_layer_norm", "gated_residual_adaln", "nearest_code", "multi_scale_quantize",
    "qk_norm_cache", "sample_tokens",
)  # fmt: skip
OPS = (*GPU_OPS, "packed_linear", "winograd_conv", "group_norm_silu")
_MODULES = {"gated_residual_adaln": "adaln_layer_norm"}  # ops that another op's module defines

# The order in which "auto" tries them; on a GPU, GPU_ORDER names the first one.
BACKENDS = ("cpu", "cuda", "triton", "reference")
GPU_BACKENDS = ("cuda", "triton")
# The types of device that each backend runs on; None means any. PyTorch calls AMD's GPUs "cuda" as well.
_DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",), "reference": None}
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The ops that each backend has, each with its dtypes.
SERVES = {
    "cpu": {
        **dict.fromkeys(OPS, _KERNEL_DTYPES),
        **dict.fromkeys(("packed_linear", "winograd_conv"), (torch.float32, torch.bfloat16)),
    },
    "cuda": dict.fromkeys(GPU_OPS, _KERNEL_DTYPES),
    "triton": dict.fromkeys(GPU_OPS, _KERNEL_DTYPES),
    "reference": dict.fromkeys(OPS, (*_KERNEL_DTYPES, torch.float64)),
}


class Choice(NamedTuple):
    """The backend that "auto" tries first on some GPUs, and why.

    `majors` are the major numbers of their compute capabilities; if empty, the choice is for all GPUs. The choices in
    :data:`GPU_ORDER` follow from the compiled code and from the cost of a launch; none of them was measured.
    """

    first: str
    why: str
    majors: tuple[int, ...] = ()


_LAUNCH = "a launch costs the host a few µs, through Triton tens"
_MEMORY = Choice("cuda", f"both are bound by memory, and {_LAUNCH}")
# The first choice that fits the GPU's compute capability counts. If the benchmarks have measured this kind of GPU,
# their result counts instead, see `measured/speeds.py`.
GPU_ORDER = {
    "block_causal_attention": (
        Choice("triton", "compiled to wgmma or tcgen05, whose peak the mma.sync of cuda does not reach", (9, 10, 11)),
        Choice("cuda", f"both multiply by mma.sync, and {_LAUNCH}"),
    ),
    "adaln_layer_norm": (_MEMORY,),
    "gated_residual_adaln": (_MEMORY,),
    "nearest_code": (Choice("cuda", f"both multiply on the fp32 units, and {_LAUNCH}"),),
    "multi_scale_quantize": (
        Choice("cuda", f"two launches for many images, else about forty as in Triton, and {_LAUNCH}"),
    ),
    "qk_norm_cache": (_MEMORY,),
    "sample_tokens": (Choice("cuda", f"the same bisection in both, and {_LAUNCH}"),),
}


def page_of(op: str) -> str:
    """The name (stem) of the module in `var_kernels` that defines the raw ops of `op`."""
    return _MODULES.get(op, op)


def _native_reason() -> str | None:
    status = load.native_library()
    return None if status.available else f"the native library is not available: {status.reason}"


def _packing_reason(dtype: torch.dtype) -> str | None:
    return packing.unavailable_reason(dtype)  # a plain function, as torch.compile wants it


def _cuda_reason(op: str) -> str | None:
    return _found_cuda_reason(op)  # a plain function, as torch.compile wants it


@functools.cache
def _found_cuda_reason(op: str) -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs, and this torch is a build for AMD's"
    if torch.cuda.get_device_capability() < (8, 0):
        return "its kernels need a GPU of compute capability 8.0 or newer"
    if (reason := _native_reason()) is not None:
        return reason
    toolkit = load.native_library().build_info["cuda"]
    if toolkit is None:
        return (
            "the native library was built without CUDA kernels: install the CUDA toolkit (nvcc), then "
            "python -m var_kernels.native.build --mode cuda"
        )
    if (driver := _driver_cuda()) < int(toolkit.partition(".")[0]):
        return f"the native library was built with CUDA {toolkit}, which a driver for CUDA {driver} cannot run"
    missing = [
        name for name in library.names(page_of(op))
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{library.NATIVE.ns}::{name}", "CUDA")
    ]  # fmt: skip
    return f"the native library has no CUDA kernel for {', '.join(missing)}" if missing else None


def _driver_cuda() -> int:
    """The major version of CUDA that the driver supports."""
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000


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
    launch = sys.modules.get(f"{__package__}.triton.launch")  # a function can be set only after importing that module
    return launch is not None and launch.has_executor()


def shipped_choice(op: str, major: int) -> Choice:
    """The row of :data:`GPU_ORDER` for `op` on NVIDIA GPUs of this compute capability."""
    return next(choice for choice in GPU_ORDER[op] if not choice.majors or major in choice.majors)


@functools.cache
def gpu_choice(op: str) -> Choice:
    """The choice for `op` on the current GPU: the measured one if its kind was measured, else the shipped one."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return Choice("triton", "the only one without an NVIDIA GPU")
    shipped = shipped_choice(op, torch.cuda.get_device_capability()[0])
    measured = speeds.read(torch.cuda.get_device_name(), GPU_BACKENDS).get(op)
    if measured is None:
        return shipped
    return Choice(measured.first(shipped.first), f"measured on this kind of GPU: {measured}")


def _first_on_gpu(op: str) -> str:
    return gpu_choice(op).first  # a plain function, as torch.compile wants it


# torch.compiler.assume_constant_result sets the same attribute. Calling it would import all of torch._dynamo, which
# takes seconds and edits the environment.
for _function in (
    _native_reason, _packing_reason, _cuda_reason, _triton_reason, _launches_elsewhere, _first_on_gpu
):  # fmt: skip
    _function._dynamo_marked_constant = True


def _lacking(backend: str, op: str, dtype: torch.dtype) -> str | None:
    """Why :data:`SERVES` excludes `backend` for this op and dtype; None if it does not."""
    if op not in SERVES[backend]:
        return "it has no kernel for this op"
    return None if dtype in SERVES[backend][op] else f"does not take {dtype}"


def unavailable_reason(
    backend: str, device_type: str, op: str, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why `backend` cannot serve `op` on `device_type` in `dtype`; None if it can."""
    devices = _DEVICES[backend]
    if devices is not None and device_type not in devices:
        return f"runs on {', '.join(devices)} tensors only"
    if (lacking := _lacking(backend, op, dtype)) is not None:
        return lacking
    if backend == "cpu":
        return _packing_reason(dtype) if op == "packed_linear" else _native_reason()
    if backend == "cuda":
        return _cuda_reason(op)
    if backend == "triton":
        return _triton_reason()
    return None


def for_op(op: str, backend: str) -> str:
    """The backend to request for `op` in a model that runs on `backend`: the reference if `backend` has no such op."""
    return "reference" if op not in SERVES.get(backend, OPS) else backend


def auto_order(op: str, device_type: str) -> tuple[str, ...]:
    """The backends in the order that "auto" tries them for `op` on this device."""
    if device_type != "cuda" or op not in GPU_OPS:
        return BACKENDS
    first = _first_on_gpu(op)
    return (first, *[name for name in BACKENDS if name != first])


def resolve(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The name of the backend that serves this call; `backend` is "auto" or the name of one.

    Raises ValueError if `backend` is unknown, or cannot serve `op` on this device in this dtype.
    """
    if backend == "auto":
        for name in auto_order(op, device_type):
            if unavailable_reason(name, device_type, op, dtype) is None:
                return name
        raise ValueError(f"{op}: no backend serves {dtype} on {device_type}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = unavailable_reason(backend, device_type, op, dtype)
    if reason is not None and backend == "triton" and _launches_elsewhere():
        reason = _lacking(backend, op, dtype)
    if reason is not None:
        serving = [name for name in BACKENDS if unavailable_reason(name, device_type, op, dtype) is None]
        raise ValueError(
            f"backend: {backend!r} cannot serve {op} on {device_type} with {dtype}: {reason}; "
            f"expected one of auto, {', '.join(serving)}"
        )
    return backend
