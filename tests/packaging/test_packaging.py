"""The build of the native library, its cache, and what happens if a part is missing.

Everything runs in fresh processes, because this one cannot unload a library. Nothing needs the network.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers.checkout import LOAD, ROOT, Checkout, environment, needs_compiler
from var_kernels.native import build, load

LEVEL_MACROS = {
    "portable": [0, 0, 0, 0, 0, 0],
    "avx2": [1, 1, 1, 0, 0, 0],
    "avx512": [1, 1, 1, 1, 0, 0],
    "avx512_bf16": [1, 1, 1, 1, 1, 0],
    "amx": [1, 1, 1, 1, 1, 1],
}


@pytest.fixture
def tiny(tmp_path):
    return Checkout(tmp_path)


@pytest.mark.parametrize("module", ["var_kernels", "var"])
def test_import_is_inert(module, tmp_path):
    code = f"""
        import os, sys
        import torch  # what torch does at import does not count
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
    compiler.write_text(f'#!/bin/sh\necho "$*" >> "{log}"\nexec {build.find_compiler().command} "$@"\n')
    compiler.chmod(0o755)
    processes = [tiny.start("-c", LOAD, CXX=f'"{compiler}"') for _ in range(4)]
    answers = [tiny.answer(process) for process in processes]
    assert all(answer["value"] == 1 for answer in answers)
    assert sorted(answer["origin"][:5] for answer in answers) == ["built", "cache", "cache", "cache"]
    compiled = [line for line in log.read_text().splitlines() if " -c " in line]
    levels = len(build.ISA_LEVELS) if build.find_compiler().x86_64 else 1
    assert len(compiled) == 2 + levels  # the build info, dispatch.cpp, and the vector code for each level


@needs_compiler
def test_every_level_gets_its_own_flags(tiny):
    library = tiny.build_in_place()
    levels = load.read_build_info(library)["isa_levels"]
    code = f"""
        import ctypes, json
        library = ctypes.CDLL({str(library)!r})
        print(json.dumps({{n: [getattr(library, "macro_" + n)(i) for i in range(6)] for n in {levels!r}}}))
    """
    process = tiny.start("-c", "import torch\n" + textwrap.dedent(code))
    macros = {name: values for name, values in tiny.answer(process).items() if name != "stderr"}
    assert macros == {name: LEVEL_MACROS[name] for name in levels}


@needs_compiler
def test_a_half_written_library_is_not_loaded(tiny, tmp_path):
    library = tiny.build_in_place()
    whole = library.read_bytes()
    assert load.read_build_info(library)["source_hash"]
    for size in (0, 1, 63, 64, len(whole) // 2, len(whole) - 1):
        (tmp_path / "part.so").write_bytes(whole[:size])
        assert load.read_build_info(tmp_path / "part.so") is None
    library.write_bytes(whole[:-1])
    answer = tiny.load()
    assert answer["value"] == 1 and answer["origin"].startswith("built on first use in ")
    Path(answer["path"]).write_bytes(whole[: len(whole) // 2])
    answer = tiny.load()
    assert answer["value"] == 1 and answer["origin"].startswith("built on first use in ")


def test_a_failed_copy_leaves_the_old_library(tmp_path, monkeypatch):
    new, old = tmp_path / "new", tmp_path / "sub" / "old"
    new.write_text("new" * 1000)
    build.install_library(new, old)

    def full_disk(source, target):
        Path(target).write_text("n")
        raise OSError("No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space"):
        build.install_library(new, old)
    assert old.read_text() == "new" * 1000 and list(old.parent.iterdir()) == [old]


def test_a_missing_compiler_is_one_warning(tiny, no_compiler):
    answer = tiny.load(PATH=no_compiler, CXX="")
    assert not answer["available"] and "no C++ compiler found" in answer["reason"]
    (message,) = answer["warnings"]
    assert "Plain PyTorch serves CPU tensors instead" in message and "g++ >= 11" in message and "set CXX" in message
    assert not answer["stderr"]


@needs_compiler
def test_a_compiler_that_does_not_work_is_named(tiny):
    answer = tiny.load(CXX="/nowhere/g++-99")
    assert "/nowhere/g++-99" in answer["reason"] and len(answer["warnings"]) == 1
    answer = tiny.load(CXX="false")
    assert "'false' does not work" in answer["reason"]


@needs_compiler
def test_a_compile_error_is_shown_and_its_correction_is_built(tiny):
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


def test_mode_none_loads_no_library(tiny):
    answer = tiny.load(VAR_KERNELS_BUILD="none")
    assert not answer["available"] and not answer["warnings"] and not answer["stderr"]
    assert answer["reason"] == "VAR_KERNELS_BUILD=none asks for no native library"
    assert not tiny.cache.exists()


@pytest.mark.parametrize(
    "arguments", [["-m", "var_kernels"], ["-m", "var_kernels.native.build"], ["setup.py", "--name"]]
)
def test_an_invalid_mode_names_the_valid_ones(arguments):
    answer = subprocess.run(
        [sys.executable, *arguments], env=environment(VAR_KERNELS_BUILD="fast"), cwd=ROOT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "VAR_KERNELS_BUILD: expected one of auto, cpu, cuda, none; got 'fast'" in answer.stderr


def test_the_reference_serves_without_a_compiler(tmp_path, no_compiler):
    """The real package, without its library, gives one warning in all and the results of the reference."""
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
    """Runs ``python -m var_kernels`` with an op whose results are wrong in one row."""
    code = """
        import sys, types
        import torch, var_kernels
        from var_kernels import __main__, _self_check, backends
        backends.OPS = ("adaln_layer_norm",)
        right, calls = _self_check.adaln_layer_norm, []
        def wrong(x, scale, shift, backend):
            y = right(x, scale, shift, backend=backend)
            calls.append(1)  # of three calls, the first two give the reference results
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
