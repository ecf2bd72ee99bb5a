"""Checks a native library with CUDA kernels, without a GPU, under a CPU build or a CUDA build of torch.

    python tools/check_cuda_library.py [LIBRARY]     # default: the one that was built ahead of time

Exit status 1 and a line for each fault. `tests/packaging/test_cuda_library.py` and `tools/check_cuda_torch.py` run it.
"""

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from var_kernels import _self_check, adaln_layer_norm, backends
from var_kernels.native import build, library, load

STREAM = "aoti_torch_get_current_cuda_stream"
# Libraries that a library for every build of torch must not require.
FORBIDDEN = ("libcudart", "libcuda.", "libc10_cuda", "libtorch_cuda")


def file_faults(path: Path) -> Iterator[str]:
    """Faults in the library's dependencies and symbols, as the loader sees them."""
    if shutil.which("readelf") is None:
        print("readelf is not installed: what the library needs is not checked")
        return
    dynamic, symbols = (
        subprocess.run(["readelf", "-W", what, path], capture_output=True, text=True, check=True).stdout
        for what in ("-d", "--dyn-syms")
    )
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    if not {"libtorch.so", "libtorch_cpu.so"} <= set(needed):
        yield f"NEEDED: expected torch's libraries, got {needed}"
    yield from (f"NEEDED: expected nothing of CUDA, got {name}" for name in needed if name.startswith(FORBIDDEN))
    if re.search(r"\(R(UN)?PATH\)", dynamic):
        yield "expected no RPATH: the path would be that of the machine that built it"
    if not re.search(rf"\bWEAK\s+DEFAULT\s+UND\s+{STREAM}$", symbols, re.M):
        yield f"expected {STREAM} to be weak and undefined"


def kernel_faults(path: Path) -> Iterator[str]:
    """Faults in the kernels that the loaded library registers."""
    sources = "".join(source.read_text() for source in (build.CSRC / "cuda").glob("*.cu"))
    expected = {"CPU": set(), "CUDA": set(re.findall(r'm\.impl\("(\w+)"', sources))}
    names = {name for op in backends.OPS for name in library.names(backends.page_of(op))}
    expected["CPU"] = names
    for key, wanted in expected.items():
        found = {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"var_kernels::{n}", key)}
        if found != wanted:
            yield f"kernels for {key}: expected {sorted(wanted)}, got {sorted(found)}"
    # Looked up through the library's own dependencies, as the loader binds the weak symbol.
    if hasattr(ctypes.CDLL(str(path)), STREAM) != (torch.version.cuda is not None):
        yield f"{STREAM}: expected with a CUDA build of torch, and with that only; this is {torch.__version__}"


def call_faults() -> Iterator[str]:
    """Faults in calls: CPU tensors must work, and backend "cuda" must say clearly why it is not available."""
    for check in _self_check.run():
        if check.failure is not None:
            yield f"{check.op}, {check.backend}, {check.dtype}: {check.failure}"
    x = torch.ones(1, 2, 8)
    calls = {
        "runs on cuda tensors only": lambda: adaln_layer_norm(x, x, x, backend="cuda"),
        "there is no GPU": lambda: backends.resolve("adaln_layer_norm", "cuda", "cuda", torch.float32),
    }
    for expected, call in calls.items():
        try:
            call()
        except ValueError as error:
            if expected not in str(error):
                yield f"expected {expected!r}, got {error}"
        else:
            if not torch.cuda.is_available():
                yield f"expected an error that says {expected!r}, got none"


def main(arguments: list[str]) -> int:
    """Runs all checks, and prints the faults and what was checked."""
    if arguments:
        build.AHEAD_OF_TIME_LIBRARY = Path(arguments[0]).resolve()
    status = load.native_library()
    if not status.available or not status.build_info["cuda"] or status.origin != "ahead of time":
        print(f"expected a library with CUDA kernels, built ahead of time from these sources, got {status}")
        return 1
    faults = [*file_faults(status.path), *kernel_faults(status.path), *call_faults()]
    for fault in faults:
        print(fault)
    archs = ", ".join(f"sm_{arch}" for arch in status.build_info["cuda_archs"])
    print(f"{len(faults)} faults in {status.path} ({archs}) under torch {torch.__version__}")
    return 1 if faults else 0


if __name__ == "__main__":
    build.replace_unprintable()
    sys.exit(main(sys.argv[1:]))
