"""Compiles .cu files with g++ into Python modules that execute them on the CPU, in three variants.

* ``fast``: soonest done, compilation and tests together;
* ``race``: every access to memory is announced and checked (races, bounds, undefined values);
* ``sanitized``: AddressSanitizer and UndefinedBehaviorSanitizer, for a process that preloads them.

Objects and modules are kept in the cache directory under the hash of what they are made of, so that only what changed
is compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock

from var_kernels.native import build as native_build

from .sanitized import CHECKED_BY_CALLS

HERE = Path(__file__).resolve().parent
RUNTIME = ("emu_scheduler.cpp", "emu_warp.cpp", "emu_memory.cpp", "emu_host.cpp")
MODULE = "cuda_emulation_runtime"

# -g1: reports name source lines. The race build must keep each access as it is written.
_COMMON = "-std=c++20 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi"
_SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer "
    f"{CHECKED_BY_CALLS}"
)
# Flags of kernels, flags of the runtime.
VARIANTS = {
    "fast": ("-O1", "-O2"),  # with kernels at -O2 compiling takes longer than the tests then save
    "race": (
        "-O1 -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-tree-vectorize -fno-tree-slp-vectorize "
        "-fno-store-merging",
        "-O2",
    ),
    "sanitized": (f"-O1 {_SANITIZERS}", f"-O1 {_SANITIZERS}"),
}
# The doors call these through the runtime, see emu_host.cpp.
_WRAPPED = (
    "aoti_torch_empty_strided", "torch_get_mutable_data_ptr", "torch_get_const_data_ptr",
    "aoti_torch_delete_tensor_object", "aoti_torch_get_device_index", "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
)  # fmt: skip


@functools.cache
def unavailable_reason() -> str | None:
    """Why CUDA kernels cannot be emulated here; None if they can."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        return "the emulation switches between threads with x86-64 instructions, on Linux"
    try:
        compiler = native_build.find_compiler()
    except native_build.BuildUnavailable as problem:
        return str(problem)
    if compiler.family != "g++":
        return f"the emulation is compiled by g++, the compiler is {compiler.family}"
    if _cuda_headers() is None:
        return "the CUDA headers are not installed (nvcc's toolkit, or the package nvidia-cuda-runtime)"
    return None


def _cuda_headers() -> Path | None:
    nvcc = native_build.find_nvcc()
    places = [nvcc.toolkit / "include"] if nvcc else []
    site = Path(sysconfig.get_path("purelib"))
    places += sorted(site.glob("nvidia/*/include"))
    wanted = ("cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h")
    return next((place for place in places if all((place / name).is_file() for name in wanted)), None)


def namespace(variant: str, label: str = "") -> str:
    """The namespace of `torch.ops` that a variant's kernels are registered in."""
    return f"var_kernels_emulated_{variant}" + (f"_{label}" if label else "")


def build(variant: str, sources: Sequence[Path], label: str = "") -> Path:
    """The module of `variant` made of the .cu files `sources`; compiled if it is not in the cache.

    Raises RuntimeError with the compiler's output where that fails.
    """
    kernel_flags, runtime_flags = VARIANTS[variant]
    torch = native_build.require_torch(native_build.find_torch())
    includes = f"-I{native_build.CSRC} -I{HERE} {native_build.stable_abi_flags(torch)} -isystem {_cuda_headers()}"
    emulate = f"-DVAR_EMULATE -DVAR_OPS_NAMESPACE={namespace(variant, label)} -DVAR_OPS_KEY=CPU"
    emulate += f" -include {HERE / 'cuda_emu.h'} -x c++"
    python = f"-isystem {sysconfig.get_path('include')} -isystem {_pybind11_include()}"
    check = f"-DEMU_CHECK_MEMORY={int(variant == 'race')}"
    # The runtime first: of an inline function that both carry, std::string's say, the linker keeps the first one, and
    # the runtime must not announce its own accesses.
    tasks = [(HERE / name, f"{_COMMON} {runtime_flags} {check} {includes}") for name in RUNTIME]
    tasks += [(HERE / "emu_bindings.cpp", f"{_COMMON} -O1 {check} {includes} {python}")]
    tasks += [(source, f"{_COMMON} {kernel_flags} {includes} {emulate}") for source in sources]
    directory = native_build.cache_root() / "cuda_emulation"
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(1, min(2, os.cpu_count() or 1))) as pool:
        objects = list(pool.map(lambda task: _compile(*task, directory), tasks))
    return _link(variant, objects, directory)


def _pybind11_include() -> str:
    import pybind11  # not at the top: where it is missing, the tests that need it say so

    return pybind11.get_include()


def _compile(source: Path, flags: str, directory: Path) -> Path:
    command = f"{native_build.find_compiler().command} {flags}"
    digest = hashlib.sha256(command.encode())
    for path in (*native_build._with_includes(source, []), *sorted(HERE.glob("*.h"))):
        digest.update(path.read_bytes())
    output = directory / f"{source.stem}-{digest.hexdigest()[:20]}.o"
    return _make(f"{command} -c {source} -o", output)


def _link(variant: str, objects: Sequence[Path], directory: Path) -> Path:
    torch = native_build.require_torch(native_build.find_torch())
    wrapped = ",".join(f"--wrap={name}" for name in _WRAPPED)
    sanitizers = _SANITIZERS if variant == "sanitized" else ""
    flags = f"-Wl,{wrapped} -L{torch.path / 'lib'} -ltorch_cpu -lc10 -Wl,-Bsymbolic {sanitizers}"
    names = " ".join(map(str, objects))
    key = hashlib.sha256(f"{names} {flags}".encode()).hexdigest()[:20]
    output = directory / f"{variant}-{key}" / f"{MODULE}.so"
    output.parent.mkdir(exist_ok=True)
    return _make(f"{native_build.find_compiler().command} -shared {names} {flags} -o", output)


def _make(command: str, output: Path) -> Path:
    """`output`, made by `command` if it is not there; by one process or thread at a time."""
    with filelock.FileLock(f"{output}.lock"):
        if output.is_file():
            return output
        temporary = output.with_name(f".{os.getpid()}-{output.name}")
        answer = subprocess.run([*shlex.split(command), str(temporary)], capture_output=True, text=True)
        if answer.returncode:
            raise RuntimeError(f"{command} failed:\n{answer.stderr[-6000:]}")
        os.replace(temporary, output)
    return output
