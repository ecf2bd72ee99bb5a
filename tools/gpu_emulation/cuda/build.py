"""Compiles .cu files with g++ into modules that execute them on the CPU. There are three variants, each with a quick
form.

* ``fast``: the least time for compiling and testing together;
* ``race``: every memory access is announced and checked (races, bounds, undefined values);
* ``sanitized``: AddressSanitizer and UndefinedBehaviorSanitizer, for a process that preloads them.

The quick form of a variant ("race quick") compiles in half the time and runs slower. It is for code that is called
once.

Objects, precompiled headers and modules are kept in the cache directory, by the hash of what they are made of, so that
only changed files are compiled again. They do not contain the namespace of the ops, which a module gets when it is
loaded. So all modules that contain a file share its object, in any process.
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
from var_kernels.native import cache

from .sanitized import CHECKED_BY_CALLS

HERE = Path(__file__).resolve().parent
RUNTIME = ("emu_scheduler.cpp", "emu_warp.cpp", "emu_memory.cpp", "emu_host.cpp", "emu_bindings.cpp")
PRELUDE = HERE / "emu_kernels.h"
MODULE = "cuda_emulation_runtime"

# -g1, so that reports can name source lines. The race build must keep each access as it is written.
_COMMON = "-std=c++20 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi"
_SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer "
    f"{CHECKED_BY_CALLS}"
)
# Flags of kernels, flags of the runtime.
VARIANTS = {
    "fast": ("-O1", "-O2"),  # with -O2 for kernels, compiling takes longer, by more than the tests then save
    "race": (
        "-O1 -fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-tree-vectorize -fno-tree-slp-vectorize "
        "-fno-store-merging",
        "-O2",
    ),
    "sanitized": (f"-O1 {_SANITIZERS}", f"-O1 {_SANITIZERS}"),
}
# Calls of these functions go to the runtime instead, see emu_host.cpp.
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


@functools.cache
def _cuda_headers() -> Path | None:
    nvcc = native_build.find_nvcc()
    places = [nvcc.toolkit / "include"] if nvcc else []
    site = Path(sysconfig.get_path("purelib"))
    places += sorted(site.glob("nvidia/*/include"))
    wanted = ("cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h")
    return next((place for place in places if all((place / name).is_file() for name in wanted)), None)


def build(variant: str, sources: Sequence[Path]) -> Path:
    """The module of `variant` made of the .cu files `sources`. It is compiled if it is not in the cache.

    Raises RuntimeError with the compiler's output if compiling fails.
    """
    name, _, quick = variant.partition(" ")
    kernel_flags, runtime_flags = VARIANTS[name]
    if quick:
        kernel_flags = kernel_flags.replace("-O1", "-O0")
    torch = native_build.require_torch(native_build.find_torch())
    includes = f"-I{native_build.CSRC} -I{HERE} {native_build.stable_abi_flags(torch)} -isystem {_cuda_headers()}"
    directory = cache.private_directory(cache.private_directory(cache.cache_root()) / "cuda_emulation")
    kernels = f"{_COMMON} {kernel_flags} {includes} -DVAR_EMULATE -x c++"
    # The runtime comes first. If it and a kernel file contain the same inline function (of std::string, for example),
    # the linker keeps the first one, and the runtime must not announce its own accesses.
    tasks = [(HERE / each, f"{_COMMON} {runtime_flags} {includes}") for each in RUNTIME]
    tasks += [(source, kernels) for source in sources]

    def compiled(task: tuple[Path, str]) -> Path:
        source, flags = task
        prelude = f"-include {_prelude(flags, directory)}" if source in sources else ""
        return _compile(source, f"{flags} {prelude}", directory)

    with ThreadPoolExecutor(max(1, min(2, os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compiled, tasks))
    return _link(name, objects, directory)


def _compile(source: Path, flags: str, directory: Path) -> Path:
    output = directory / f"{source.stem}-{_digest(source, flags)}.o"
    return _make(f"{native_build.find_compiler().command} {flags} -c {source} -o", output)


def _prelude(flags: str, directory: Path) -> Path:
    """A header that includes emu_kernels.h. g++ uses the precompiled header beside it, which is made for these
    flags."""
    header = directory / f"prelude-{_digest(PRELUDE, flags)}" / "prelude.h"
    if not header.is_file():
        native_build.write_atomically(header, lambda path: Path(path).write_text(f'#include "{PRELUDE}"\n'))
    flags = flags.replace("-x c++", "-x c++-header")
    _make(f"{native_build.find_compiler().command} {flags} {header} -o", header.with_name("prelude.h.gch"))
    return header


def _digest(source: Path, flags: str) -> str:
    digest = hashlib.sha256(f"{native_build.find_compiler()} {native_build.find_torch()} {flags}".encode())
    for path in (*native_build._with_includes(source, []), *native_build._with_includes(PRELUDE, [])):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


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
    """Returns `output`. If it does not exist, `command` makes it, in one process or thread at a time."""

    def run(temporary: str) -> None:
        answer = subprocess.run([*shlex.split(command), temporary], capture_output=True, text=True)
        if answer.returncode:
            raise RuntimeError(f"{command} failed:\n{answer.stderr[-6000:]}")

    with filelock.FileLock(f"{output}.lock"):
        if not output.is_file():
            native_build.write_atomically(output, run)
    return output
