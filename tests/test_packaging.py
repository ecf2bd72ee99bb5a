"""The build, its cache, and what happens where a piece is missing; most of it on a copy with a tiny ``csrc``.

Everything runs in fresh processes: loading a library cannot be undone in this one. Nothing needs the network.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from pathlib import Path

import pytest

from var_kernels import _build, _native

ROOT = Path(__file__).resolve().parent.parent
LEVEL_MACROS = {
    "portable": [0, 0, 0, 0, 0],
    "avx2": [1, 1, 1, 0, 0],
    "avx512": [1, 1, 1, 1, 0],
    "avx512_bf16": [1, 1, 1, 1, 1],
}

TINY_HEADER = "#define TINY_VALUE 1\n"
TINY_ISA = """
#include "tiny.h"
#ifndef __AVX2__
#define __AVX2__ 0
#endif
#ifndef __FMA__
#define __FMA__ 0
#endif
#ifndef __F16C__
#define __F16C__ 0
#endif
#ifndef __AVX512DQ__
#define __AVX512DQ__ 0
#endif
#ifndef __AVX512BF16__
#define __AVX512BF16__ 0
#endif
static_assert(!__FINITE_MATH_ONLY__, "NaN and infinity must behave");
namespace var_kernels::VAR_ISA {
int value() { return TINY_VALUE; }
int macro(int i) {
  const int macros[] = {__AVX2__, __FMA__, __F16C__, __AVX512DQ__, __AVX512BF16__};
  return macros[i];
}
}
"""
TINY_DISPATCH = """
#ifdef VAR_ISA_X86
#define LEVELS(X) X(portable) X(avx2) X(avx512) X(avx512_bf16)
#else
#define LEVELS(X) X(portable)
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))
#define LEVEL(name) namespace var_kernels::name { int value(); int macro(int); } \\
  EXPORT int macro_##name(int i) { return var_kernels::name::macro(i); }
LEVELS(LEVEL)
EXPORT int tiny_value() { return var_kernels::portable::value(); }
EXPORT const char* var_kernels_isa() { return "portable"; }
EXPORT int var_kernels_vector_width() { return 4; }
"""

LOAD = """
import ctypes, json, warnings
from var_kernels import _native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    status = _native.load()
    assert _native.load() is status
value = ctypes.CDLL(str(status.path)).tiny_value() if status.available else None
print(json.dumps(dict(available=status.available, reason=status.reason, origin=status.origin, path=str(status.path),
                      value=value, warnings=[str(w.message) for w in caught])))
"""


def has_compiler():
    try:
        return bool(_build.find_compiler())
    except _build.BuildUnavailable:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")


class Checkout:
    """A copy of the package in a directory of its own, with its own cache."""

    def __init__(self, root: Path, files: tuple[str, ...]):
        self.root, self.cache = root / "checkout", root / "cache"
        self.package, self.csrc = self.root / "var_kernels", self.root / "csrc"
        self.package.mkdir(parents=True)
        for name in files:
            shutil.copy(ROOT / "var_kernels" / name, self.package / name)
        (self.package / "__init__.py").touch()
        (self.csrc / "cpu").mkdir(parents=True)
        (self.csrc / "tiny.h").write_text(TINY_HEADER)
        (self.csrc / "cpu/tiny.isa.cpp").write_text(TINY_ISA)
        (self.csrc / "cpu/dispatch.cpp").write_text(TINY_DISPATCH)

    def environment(self, **changes: str) -> dict[str, str]:
        return environment(**{"PYTHONPATH": str(self.root), "VAR_KERNELS_CACHE": str(self.cache)} | changes)

    def start(self, *arguments: str, **changes: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(
            [sys.executable, *arguments], env=self.environment(**changes), cwd=self.root.parent, **pipes
        )

    def load(self, **changes: str) -> dict:
        """What ``_native.load()`` answers in a fresh process; ``stderr`` added."""
        return self.answer(self.start("-c", LOAD, **changes))

    @staticmethod
    def answer(process: subprocess.Popen) -> dict:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        return json.loads(stdout) | {"stderr": stderr}

    def build_in_place(self) -> Path:
        process = self.start(str(self.package / "_build.py"))
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        return self.package / _build.LIBRARY_NAME

    def edit(self, value: int) -> None:
        """Changes the header that the vector code includes; its time stays in the past, as a restored file's does."""
        (self.csrc / "tiny.h").write_text(f"#define TINY_VALUE {value}\n")
        os.utime(self.csrc / "tiny.h", (1e9, 1e9))


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without the settings of the package, plus `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VAR_KERNELS_", "PYTHON"))}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


@pytest.fixture
def tiny(tmp_path):
    return Checkout(tmp_path, ("_build.py", "_native.py"))


@pytest.fixture
def no_compiler(tmp_path):
    """A PATH without any compiler."""
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


@pytest.mark.parametrize("module", ["var_kernels", "var"])
def test_import_is_inert(module, tmp_path):
    code = f"""
        import os, sys
        import torch  # not ours: what it does at import is not counted
        loaded, threads, variables = set(torch.ops.loaded_libraries), torch.get_num_threads(), dict(os.environ)
        modules, events = set(sys.modules), []
        forbidden = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.putenv", "ctypes.dlopen")
        sys.addaudithook(lambda event, _: event in forbidden and events.append(event))
        import {module}
        assert not events, events
        assert set(torch.ops.loaded_libraries) == loaded
        assert torch.get_num_threads() == threads and dict(os.environ) == variables
        late = {{name.partition(".")[0] for name in set(sys.modules) - modules}}
        assert not late & {{"triton", "ninja", "filelock"}}, late
    """
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=environment(VAR_KERNELS_CACHE=str(tmp_path / "cache")),
    )  # fmt: skip
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert not (tmp_path / "cache").exists()


@needs_compiler
def test_builds_at_first_use_then_loads_from_the_cache(tiny):
    first, second = tiny.load(), tiny.load()
    assert first["origin"].startswith("built on first use in ")
    assert "[var_kernels] compiling the CPU kernels, once" in first["stderr"]
    assert second["origin"] == "cached" and second["stderr"] == ""
    assert Path(second["path"]).is_relative_to(tiny.cache)
    assert first["value"] == second["value"] == 1 and not first["warnings"] + second["warnings"]


@needs_compiler
def test_a_stale_library_is_never_loaded(tiny):
    tiny.build_in_place()
    built = "built on first use in "
    for value, origin in ((1, "ahead of time"), (2, built), (3, built), (2, "cached"), (1, "ahead of time")):
        tiny.edit(value)
        answer = tiny.load()
        assert answer["origin"].startswith(origin) and answer["value"] == value


@needs_compiler
def test_many_processes_build_once(tiny, tmp_path):
    compiler, log = tmp_path / "g++ logging", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\nexec {_build.find_compiler().command} "$@"\n')
    compiler.chmod(0o755)
    processes = [tiny.start("-c", LOAD, CXX=f'"{compiler}"') for _ in range(4)]
    answers = [tiny.answer(process) for process in processes]
    assert all(answer["value"] == 1 for answer in answers)
    assert sorted(answer["origin"][:5] for answer in answers) == ["built", "cache", "cache", "cache"]
    compiled = [line for line in log.read_text().splitlines() if " -c " in line]
    levels = len(_build.ISA_LEVELS) if _build.find_compiler().x86_64 else 1
    assert len(compiled) == 2 + levels  # the build info, the door, and the vector code per level


@needs_compiler
def test_every_level_gets_its_own_flags(tiny):
    library = tiny.build_in_place()
    levels = _native.read_build_info(library)["isa_levels"]
    code = f"""
        import ctypes, json
        library = ctypes.CDLL({str(library)!r})
        print(json.dumps({{n: [getattr(library, "macro_" + n)(i) for i in range(5)] for n in {levels!r}}}))
    """
    process = tiny.start("-c", "import torch\n" + textwrap.dedent(code))
    macros = {name: values for name, values in tiny.answer(process).items() if name != "stderr"}
    assert macros == {name: LEVEL_MACROS[name] for name in levels}


@needs_compiler
def test_a_half_written_library_is_not_loaded(tiny, tmp_path):
    library = tiny.build_in_place()
    whole = library.read_bytes()
    assert _native.read_build_info(library)["source_hash"]
    for size in (0, 1, 63, 64, len(whole) // 2, len(whole) - 1):
        (tmp_path / "part.so").write_bytes(whole[:size])
        assert _native.read_build_info(tmp_path / "part.so") is None
    library.write_bytes(whole[:-1])
    answer = tiny.load()
    assert answer["value"] == 1 and answer["origin"].startswith("built on first use in ")
    Path(answer["path"]).write_bytes(whole[: len(whole) // 2])
    answer = tiny.load()
    assert answer["value"] == 1 and answer["origin"].startswith("built on first use in ")


def test_a_failed_copy_leaves_the_old_library(tmp_path, monkeypatch):
    new, old = tmp_path / "new", tmp_path / "sub" / "old"
    new.write_text("new" * 1000)
    _build.install_library(new, old)

    def full_disk(source, target):
        Path(target).write_text("n")
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space"):
        _build.install_library(new, old)
    assert old.read_text() == "new" * 1000 and list(old.parent.iterdir()) == [old]


def test_a_missing_compiler_is_one_warning(tiny, no_compiler):
    answer = tiny.load(PATH=no_compiler, CXX="")
    assert not answer["available"] and "no C++ compiler found" in answer["reason"]
    (message,) = answer["warnings"]
    assert "plain PyTorch serves instead" in message and "g++ >= 11" in message and "set CXX" in message
    assert not answer["stderr"]


@needs_compiler
def test_a_compiler_that_does_not_work_is_named(tiny):
    answer = tiny.load(CXX="/nowhere/g++-99")
    assert "/nowhere/g++-99" in answer["reason"] and len(answer["warnings"]) == 1
    answer = tiny.load(CXX="false")
    assert "'false' does not work" in answer["reason"]


@needs_compiler
def test_a_compile_error_is_shown_and_later_mended(tiny):
    good = (tiny.csrc / "cpu/dispatch.cpp").read_text()
    (tiny.csrc / "cpu/dispatch.cpp").write_text(good + "\nnonsense;\n")
    answer = tiny.load()
    assert not answer["available"] and "nonsense" in answer["reason"] and len(answer["warnings"]) == 1
    (tiny.csrc / "cpu/dispatch.cpp").write_text(good)
    assert tiny.load()["value"] == 1


@needs_compiler
@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_cache_is_one_warning(tiny, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    answer = tiny.load(VAR_KERNELS_CACHE=str(tmp_path / "locked" / "cache"))
    assert not answer["available"] and "VAR_KERNELS_CACHE" in answer["reason"] and len(answer["warnings"]) == 1


def test_a_cache_that_is_a_file_is_one_warning(tiny, tmp_path):
    (tmp_path / "file").touch()
    answer = tiny.load(VAR_KERNELS_CACHE=str(tmp_path / "file"))
    assert not answer["available"] and "VAR_KERNELS_CACHE" in answer["reason"] and len(answer["warnings"]) == 1


def test_none_asks_for_no_library(tiny):
    answer = tiny.load(VAR_KERNELS_BUILD="none")
    assert not answer["available"] and not answer["warnings"] and not answer["stderr"]
    assert answer["reason"] == "VAR_KERNELS_BUILD=none asks for no native library"
    assert not tiny.cache.exists()


@pytest.mark.parametrize("arguments", [["-m", "var_kernels"], ["-m", "var_kernels._build"], ["setup.py", "--name"]])
def test_an_invalid_mode_names_the_valid_ones(arguments):
    answer = subprocess.run(
        [sys.executable, *arguments], env=environment(VAR_KERNELS_BUILD="fast"), cwd=ROOT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "VAR_KERNELS_BUILD: expected one of auto, cpu, cuda, none; got 'fast'" in answer.stderr


def test_the_reference_serves_without_a_compiler(tmp_path, no_compiler):
    """The real package, its library out of reach: one warning in all, and the reference's results."""
    shutil.copytree(
        ROOT / "var_kernels", tmp_path / "real/var_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(ROOT / "csrc", tmp_path / "real/csrc")
    code = """
        import warnings
        import torch, var_kernels
        x, scale, shift = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = [var_kernels.adaln_layer_norm(x, scale, shift) for _ in range(2)]
            tokens = var_kernels.nearest_code(x, scale)
        assert [str(w.message).count("no C++ compiler found") for w in caught] == [1], caught
        assert torch.equal(y[0], var_kernels.adaln_layer_norm(x, scale, shift, backend="reference"))
        try:
            var_kernels.adaln_layer_norm(x, scale, shift, backend="cpu")
        except ValueError as error:
            assert "no C++ compiler found" in str(error)
        else:
            raise AssertionError("a backend asked for by name must not be replaced")
    """
    settings = {"PYTHONPATH": str(tmp_path / "real"), "VAR_KERNELS_CACHE": str(tmp_path / "cache"), "CXX": ""}
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment(PATH=no_compiler, **settings), cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr


def test_a_failed_check_is_an_exit_status_of_1(tmp_path):
    """``python -m var_kernels`` with an op whose results are wrong in one row."""
    code = """
        import sys, types
        import torch, var_kernels
        from var_kernels import __main__, _self_check, backends
        backends.OPS = ("adaln_layer_norm",)
        right, calls = _self_check.adaln_layer_norm, []
        def wrong(x, scale, shift, backend):
            y = right(x, scale, shift, backend=backend)
            calls.append(1)  # of three calls the first two are the judges
            return torch.cat([y[:, :-1], y[:, -1:] * 1.1], 1) if len(calls) % 3 == 0 else y
        if sys.argv.pop() == "wrong":
            _self_check.adaln_layer_norm = wrong
        sys.exit(__main__.main())
    """
    for argument, status in (("right", 0), ("wrong", 1)):
        answer = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), argument], cwd=ROOT, capture_output=True, text=True,
            env=environment(VAR_KERNELS_BUILD="none", VAR_KERNELS_CACHE=str(tmp_path / "cache")), timeout=120,
        )  # fmt: skip
        assert answer.returncode == status, answer.stdout + answer.stderr
        assert ("FAILED" in answer.stdout) == bool(status)


class Environment:
    """A fresh virtual environment with setuptools and ninja, or with all packages of the one that runs the tests."""

    def __init__(self, root: Path, *, torch: bool):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=120)
        self.python, self.root = root / "bin/python", root
        self.site = next(root.glob("lib/python3*/site-packages"))
        here = Path(sysconfig.get_path("purelib"))
        if torch:
            (self.site / "all.pth").write_text(str(here))
        else:
            for pattern in ("setuptools*", "_distutils_hack", "ninja*"):
                for package in here.glob(pattern):
                    (self.site / package.name).symlink_to(package)
        (root / "bin/ninja").symlink_to(_build.find_ninja())

    def pip(self, *arguments: str | Path, status: int = 0, **changes: str) -> str:
        """Runs the pip of the tests on this environment, without the network; returns all that it prints."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        answer = subprocess.run(
            [str(part) for part in command], env=environment(PIP_NO_INDEX="1", **changes), cwd=self.root, timeout=180,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert answer.returncode == status, answer.stdout
        return answer.stdout

    def load(self, cache: Path, **changes: str) -> dict:
        """What ``_native.load()`` answers in this environment."""
        process = subprocess.Popen(
            [str(self.python), "-c", LOAD], env=environment(VAR_KERNELS_CACHE=str(cache), **changes), cwd=self.root,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return Checkout.answer(process)


PIP_FLAGS = ("--no-build-isolation", "--no-deps", "-v")


@pytest.fixture
def project(tiny, tmp_path):
    """The project as pip sees it, with the tiny ``csrc`` in place of the real one."""
    target = tmp_path / "project"
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    (target / "README.md").write_text("# var-kernels\n")
    for name in ("var", "var_kernels"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(tiny.csrc, target / "csrc")
    return target


def wheel_names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
@needs_compiler
def test_editable_install_builds_ahead_of_time(project, tmp_path):
    target = Environment(tmp_path / "venv", torch=True)
    assert "[var_kernels] built _C.abi3.so" in target.pip("install", *PIP_FLAGS, "-e", project)
    answer = target.load(tmp_path / "cache")
    assert (answer["origin"], answer["value"]) == ("ahead of time", 1)
    assert Path(answer["path"]) == project / "var_kernels/_C.abi3.so"
    (project / "csrc/tiny.h").write_text("#define TINY_VALUE 5\n")
    answer = target.load(tmp_path / "cache")
    assert answer["origin"].startswith("built on first use in ") and answer["value"] == 5
    target.pip("install", *PIP_FLAGS, "-e", project)
    answer = target.load(tmp_path / "cache")
    assert (answer["origin"], answer["value"]) == ("ahead of time", 5)


@pytest.mark.slow
@needs_compiler
def test_wheel_installs_elsewhere(project, tmp_path, no_compiler):
    builder, user = (Environment(tmp_path / name, torch=True) for name in ("builder", "user"))
    builder.pip("wheel", *PIP_FLAGS, "-w", tmp_path, project)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("var_kernels-0.1.0-cp310-abi3-")
    weights = {f"var/weights/{path.name}" for path in (ROOT / "var/weights").glob("*") if path.is_file()}
    sources = {f"var_kernels/csrc/{name}" for name in ("tiny.h", "cpu/tiny.isa.cpp", "cpu/dispatch.cpp")}
    assert wheel_names(wheel) >= weights | sources | {"var_kernels/_C.abi3.so", "var/__init__.py"}
    assert not {name for name in wheel_names(wheel) if name.startswith(("tests", "csrc", "benchmarks", "build"))}
    shutil.rmtree(project)
    user.pip("install", *PIP_FLAGS, wheel)
    answer = user.load(tmp_path / "cache", PATH=no_compiler)
    assert (answer["origin"], answer["value"]) == ("ahead of time", 1)
    assert Path(answer["path"]).is_relative_to(user.site)
    user.pip("uninstall", "-y", "var-kernels")
    assert not (user.site / "var_kernels/csrc").exists() and not (user.site / "var_kernels/_C.abi3.so").exists()


@pytest.mark.slow
@needs_compiler
def test_without_torch_the_wheel_builds_at_first_use(project, tmp_path):
    builder, user = Environment(tmp_path / "builder", torch=False), Environment(tmp_path / "user", torch=True)
    printed = builder.pip("wheel", *PIP_FLAGS, "-w", tmp_path, project)
    assert "at first use: torch (>= 2.10) is not installed" in printed
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == "var_kernels-0.1.0-py3-none-any.whl"
    user.pip("install", *PIP_FLAGS, wheel)
    origins = [user.load(tmp_path / "cache")["origin"] for _ in range(2)]
    assert origins[0].startswith("built on first use in ") and origins[1] == "cached"


@pytest.mark.slow
def test_install_without_a_compiler(project, tmp_path, no_compiler):
    target = Environment(tmp_path / "venv", torch=True)
    missing = {"PATH": no_compiler, "CXX": ""}
    assert "at first use: no C++ compiler found" in target.pip("install", *PIP_FLAGS, "-e", project, **missing)
    assert target.load(tmp_path / "cache", **missing)["warnings"]
    target.pip("install", *PIP_FLAGS, "-e", project, VAR_KERNELS_BUILD="none", **missing)
    for mode in ("cpu", "cuda"):
        printed = target.pip("install", *PIP_FLAGS, "-e", project, status=1, VAR_KERNELS_BUILD=mode, **missing)
        assert f"VAR_KERNELS_BUILD={mode}: no C++ compiler found" in printed


@pytest.mark.slow
@needs_compiler
def test_a_compile_error_stops_only_an_explicit_build(project, tmp_path):
    target = Environment(tmp_path / "venv", torch=True)
    (project / "csrc/cpu/dispatch.cpp").write_text("nonsense;\n")
    target.pip("install", *PIP_FLAGS, "-e", project)
    assert not (project / "var_kernels/_C.abi3.so").exists()
    assert "nonsense" in target.pip("install", *PIP_FLAGS, "-e", project, status=1, VAR_KERNELS_BUILD="cpu")
