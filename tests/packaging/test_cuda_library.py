"""The library with CUDA kernels, built against the torch of the tests, which may be a CPU build.

The tests look at what it needs from the loader, what it registers, and its message without a GPU.
`tools/check_cuda_torch.py` does the same next to a CUDA build of torch.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.checkout import ROOT, environment, needs_compiler
from tools import check_cuda_library
from var_kernels.native import build, cache

needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    changes = {"PYTHONPATH": str(ROOT), "VAR_KERNELS_CACHE": str(cache.cache_root())}
    return subprocess.run(
        [sys.executable, *arguments], env=environment(**changes), cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.evidence
@needs_compiler
@pytest.mark.skipif(build.find_nvcc() is None, reason="nvcc is not installed")
def test_cuda_kernels_are_built_and_registered_without_a_gpu(tmp_path):
    library = tmp_path / build.LIBRARY_NAME
    # One architecture only, to save time.
    built = run("-m", "var_kernels.native.build", "--mode", "cuda", "--archs", "80", "--output", library)
    assert built.returncode == 0, built.stdout
    checked = run(ROOT / "tools/check_cuda_library.py", library)
    assert checked.returncode == 0 and f"0 faults in {library} (sm_80)" in checked.stdout, checked.stdout


def compiled(directory: Path, code: str, *flags: str) -> Path:
    source, library = directory / "library.cpp", directory / "library.so"
    source.write_text(code)
    subprocess.run([build.find_compiler().command, "-shared", "-fPIC", source, "-o", library, *flags], check=True)
    return library


@needs_compiler
@needs_readelf
def test_the_check_finds_what_ties_a_library_to_one_torch(tmp_path):
    name = check_cuda_library.STREAM
    weak = f'extern "C" __attribute__((weak)) int {name}(); auto kept = {name};'
    stand_ins = {name: tmp_path / f"{name}.so" for name in ("libtorch", "libtorch_cpu", "libtorch_cuda", "libcudart")}
    for library in stand_ins.values():
        shutil.copy(compiled(tmp_path, "", f"-Wl,-soname,{library.name}"), library)
    torch_only = ("-Wl,--no-as-needed", f"-L{tmp_path}", "-ltorch", "-ltorch_cpu")
    assert list(check_cuda_library.file_faults(compiled(tmp_path, weak, *torch_only))) == []
    (fault,) = check_cuda_library.file_faults(compiled(tmp_path, weak, *torch_only, "-lcudart"))
    assert fault == "NEEDED: expected nothing of CUDA, got libcudart.so"
    (fault,) = check_cuda_library.file_faults(compiled(tmp_path, weak, *torch_only, "-Wl,-rpath,/somewhere"))
    assert fault.startswith("expected no RPATH")
    (fault,) = check_cuda_library.file_faults(compiled(tmp_path, weak.replace("(weak)", "()"), *torch_only))
    assert fault.endswith("to be weak and undefined")
    (fault,) = check_cuda_library.file_faults(compiled(tmp_path, weak))
    assert fault.startswith("NEEDED: expected torch's libraries, got [")


@pytest.mark.evidence
def test_a_library_without_cuda_kernels_is_refused(cpu):
    from var_kernels.native import load

    answer = run(ROOT / "tools/check_cuda_library.py", load.native_library().path)
    assert answer.returncode == 1 and "expected a library with CUDA kernels" in answer.stdout
