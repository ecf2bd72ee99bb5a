"""Compiles the CUDA kernels with nvcc and the options of the real build. The output is kept in the cache, so that the
report and the tests compile a file once per architecture."""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock

from var_kernels.native import build, cache

_JOBS = 2  # compilations at a time
_TYPES = {"__nv_bfloat16": "bf16", "__half": "fp16"}  # the shorter names are those of the report


def unavailable_reason() -> str | None:
    """Why CUDA kernels cannot be compiled here; None if they can."""
    return "nvcc is not installed" if build.find_nvcc() is None else None


def release() -> str:
    """The release of nvcc, such as "13.0". BuildUnavailable without nvcc."""
    return ".".join(map(str, _nvcc().release))


@functools.cache
def _nvcc() -> build.Nvcc:
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise build.BuildUnavailable(unavailable_reason())
    return nvcc


def output(source: Path, arch: str, kind: str) -> Path:
    """The output of nvcc for a .cu file and `arch` ("sm_80"). `kind` is "ptx" or "cubin".

    Raises BuildUnavailable without nvcc, and BuildFailed with nvcc's output if it fails.
    """
    torch = build.require_torch(build.find_torch())
    command = f"{build.nvcc_command(_nvcc())} -arch={arch} -{kind} -I{shlex.quote(str(build.CSRC))} "
    command += build.stable_abi_flags(torch)
    digest = hashlib.sha256(f"{command} {release()} {torch.version}".encode())
    for path in build._with_includes(source, []):
        digest.update(path.read_bytes())
    directory = cache.private_directory(cache.private_directory(cache.cache_root()) / "nvcc")
    result = directory / f"{source.stem}-{arch}-{digest.hexdigest()[:20]}.{kind}"
    with filelock.FileLock(f"{result}.lock"):
        if not result.is_file():
            build.write_atomically(result, lambda temporary: _run(command, source, temporary))
    return result


def _run(command: str, source: Path, output: str) -> None:
    answer = subprocess.run([*shlex.split(command), str(source), "-o", output], capture_output=True, text=True)
    if answer.returncode:
        raise build.BuildFailed(f"{command} {source} failed:\n{answer.stderr[-6000:]}")


def outputs(source: Path, archs: Sequence[str], kind: str) -> list[Path]:
    """`output` for each architecture, two at a time."""
    with ThreadPoolExecutor(_JOBS) as pool:
        return list(pool.map(lambda arch: output(source, arch, kind), archs))


def plain_names(symbols: Sequence[str]) -> list[str]:
    """`plain_name` of mangled symbols."""
    answer = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [plain_name(line) for line in answer.stdout.splitlines()]


def plain_name(demangled: str) -> str:
    """A function's name without return type, parameters, namespaces, and the casts that demanglers put before
    enumerators."""
    name = re.sub(r"^void |\(anonymous namespace\)::|\bvar_kernels::|\([\w:]+\)(?=-?\d)|\(.*", "", demangled)
    return re.sub(r"\b(__nv_bfloat16|__half)\b", lambda match: _TYPES[match[0]], name)
