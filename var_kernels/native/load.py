"""Finds or builds the native library and loads it, once, at the first call of an op that wants ``cpu`` or ``cuda``.

A library is loaded only if the source hash embedded in it equals that of the present sources: a changed file under
``csrc/`` leads to a new build, never to outdated kernels. First comes the library built ahead of time inside the
package, then the one in the cache, then a build into the cache under a lock. Where another user can write, no library
is loaded from the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import platform
import shutil
import struct
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import build, cache

_KEPT_LIBRARIES = 8
_LOCK_TIMEOUT_S = 1800


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native library serves this process. If not, `reason` says why; if so, the other fields describe it.

    `origin` is "ahead of time", "cached" or "built on first use in N s". `isa` is the level in use, and `vector_width`
    the number of floats in its vectors. `build_info` says what the library was built from (source_hash, torch,
    compiler, isa_levels, cuda, cuda_archs).
    """

    available: bool
    reason: str | None = None
    path: Path | None = None
    origin: str | None = None
    isa: str | None = None
    vector_width: int | None = None
    build_info: dict = field(default_factory=dict)


_lock = threading.Lock()
_status: NativeStatus | None = None


def native_library() -> NativeStatus:
    """The state of the native library. The first call loads it, and later calls return the same; safe from any thread.

    If the library is not available, one warning says why and what to install. With ``VAR_KERNELS_BUILD=none`` no
    library is loaded, without a warning. Raises ValueError for an invalid ``VAR_KERNELS_BUILD``.
    """
    global _status
    if _status is None:
        with _lock:
            if _status is None:
                _status = _load()
    return _status


def _load() -> NativeStatus:
    mode = build.build_mode()
    if mode == "none":
        return NativeStatus(False, "VAR_KERNELS_BUILD=none asks for no native library")
    try:
        found = build.find_torch()
        return _load_ahead_of_time(mode, found) or _load_cached(mode, build.require_torch(found))
    except (build.BuildUnavailable, build.BuildFailed, OSError) as error:
        reason = str(error)
    warnings.warn(
        "var_kernels: the native kernels are not available. Plain PyTorch serves CPU tensors instead, which is slower, "
        f"and Triton serves GPU tensors if it is available. The reason is: {reason} "
        "(VAR_KERNELS_BUILD=none silences this warning)",
        RuntimeWarning,
        stacklevel=2,
    )
    return NativeStatus(False, reason)


def _load_ahead_of_time(mode: str, found: build.TorchInstall | None) -> NativeStatus | None:
    info = _current_info(build.AHEAD_OF_TIME_LIBRARY)
    if info is None:
        return None
    # The library was built for a CPU torch that a CUDA torch has replaced, so it lacks the CUDA kernels.
    if not info["cuda"] and found and build.cuda_compiler(mode, found):
        return None
    try:
        return _open(build.AHEAD_OF_TIME_LIBRARY, "ahead of time", info)
    except OSError:
        return None  # The library was built on another system, perhaps with a newer glibc; this one needs its own.


def _load_cached(mode: str, found: build.TorchInstall) -> NativeStatus:
    """Loads the library of these sources from the cache. If it is not there, one process builds it at a time."""
    flavour = "cuda" if build.cuda_compiler(mode, found) else "cpu"
    torch_version = ".".join(map(str, found.major_minor))
    key = f"{build.source_hash()[:16]}-torch{torch_version}-{flavour}-{platform.machine()}"
    for root in cache.cache_roots():
        with contextlib.suppress(OSError):  # it cannot be read, or others can write to it
            if info := _info_of_own(root / key / build.LIBRARY_NAME):
                return _open(root / key / build.LIBRARY_NAME, "cached", info)
    root, arrived, origin = cache.cache_root(), time.time(), "cached"
    library = root / key / build.LIBRARY_NAME
    with _exclusive(root, found):
        info = _info_of_own(library)
        if info is None:
            origin = _build_once(library, mode, found, arrived)
            info = _current_info(library)
    if info is None:
        raise build.BuildFailed(f"the sources in {build.CSRC} changed while they were compiled; try again")
    return _open(library, origin, info)


def _info_of_own(library: Path) -> dict | None:
    """The build info of a current library in the cache, else None. Raises OSError if others can write to it."""
    info = _current_info(library)
    if info is not None:
        for path in (library.parent.parent, library.parent, library):
            cache.refuse_shared(path)
    return info


def _current_info(library: Path) -> dict | None:
    """The build info of `library` if the file is complete and was built from the present sources, else None."""
    info = read_build_info(library)
    return info if info and info["source_hash"] == build.source_hash() else None


def read_build_info(library: Path) -> dict | None:
    """The build info of `library`, read without loading it; None unless the file is a complete library of this package.

    Loading it first would be too late, because its outdated kernels would then be registered.
    """
    if not library.is_file() or library.stat().st_size < 64:
        return None
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] == b"\x7fELF" and not _elf_is_complete(data):
            return None
        start = data.find(build.INFO_MARKER)
        end = data.find(b"\0", start)
        if start < 0 or end < 0:
            return None
        try:
            return json.loads(data[start + len(build.INFO_MARKER) : end])
        except ValueError:
            return None


def _elf_is_complete(data: mmap.mmap) -> bool:
    """Whether a 64-bit little-endian ELF file reaches to the end of its section table, which linkers write last."""
    if data[4:6] != b"\x02\x01":
        return False
    (section_table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, entries = struct.unpack_from("<HH", data, 0x3A)
    return section_table > 0 and len(data) >= section_table + entry_size * entries


def _exclusive(root: Path, found: build.TorchInstall):
    """Acquires the inter-process lock of the object files in `root` that a build for `found` uses."""
    import filelock  # imported here, so that importing var_kernels loads only what the reference needs

    directory = build.object_dir(root, found)
    lock = filelock.FileLock(str(directory / "lock"), timeout=_LOCK_TIMEOUT_S)
    try:
        cache.private_directory(root)
        cache.private_directory(directory)
        try:
            return lock.acquire(timeout=0)
        except filelock.Timeout:
            _progress("another process is compiling the kernels; waiting for it")
        return lock.acquire()
    except filelock.Timeout as error:
        message = f"another process has held {lock.lock_file} for {_LOCK_TIMEOUT_S} s"
        raise build.BuildUnavailable(message) from error
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        advice = "set VAR_KERNELS_CACHE to a directory that you can write to and others cannot"
        raise build.BuildUnavailable(f"the cache directory cannot be used ({error}): {advice}") from error


def _build_once(library: Path, mode: str, found: build.TorchInstall, arrived: float) -> str:
    """Builds `library` and returns its origin. The caller holds the lock; it began to wait for it at time `arrived`."""
    failure = library.with_name("failure.txt")
    # Of N processes that wait for the lock only one tries a build that fails: it would fail for the others as well.
    if failure.is_file() and failure.stat().st_mtime >= arrived:
        raise build.BuildFailed(failure.read_text(encoding="utf-8"))
    build.find_compiler()
    what = (
        "CPU and CUDA kernels, once, some minutes"
        if build.cuda_compiler(mode, found)
        else "CPU kernels, once, about 30 s"
    )
    _progress(f"compiling the {what} ...")
    start = time.perf_counter()
    cache.private_directory(library.parent)
    try:
        build.build(library, build.object_dir(library.parent.parent, found), mode=mode, torch=found)
    except build.BuildFailed as error:
        failure.write_text(str(error), encoding="utf-8")
        raise
    library.chmod(0o755 & library.stat().st_mode)  # others must not write to it, whatever the umask is
    failure.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    _progress(f"compiled in {seconds:.0f} s: {library}")
    _discard_old(library)
    return f"built on first use in {seconds:.0f} s"


def _discard_old(library: Path) -> None:
    """Deletes all but the newest libraries of this flavour and machine: edited sources must not fill the cache."""
    suffix = library.parent.name.split("-", 1)[1]
    with contextlib.suppress(OSError):  # another process may be discarding the same ones
        others = sorted(library.parent.parent.glob(f"*-{suffix}"), key=lambda path: path.stat().st_mtime, reverse=True)
        for directory in others[_KEPT_LIBRARIES:]:
            shutil.rmtree(directory, ignore_errors=True)


def _open(library: Path, origin: str, info: dict) -> NativeStatus:
    torch.ops.load_library(str(library))
    symbols = ctypes.CDLL(str(library))
    symbols.var_kernels_isa.restype = ctypes.c_char_p
    symbols.var_kernels_vector_width.restype = ctypes.c_int
    # This is null if VAR_KERNELS_ISA names no level of this machine; the first call of an op then raises.
    isa = symbols.var_kernels_isa()
    return NativeStatus(True, None, library, origin, isa and isa.decode(), symbols.var_kernels_vector_width(), info)


def _progress(message: str) -> None:
    print(f"[var_kernels] {message}", file=sys.stderr, flush=True)
