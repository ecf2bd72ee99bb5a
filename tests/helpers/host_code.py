"""Compiles C++ of `csrc` that needs neither torch nor a GPU, so that a test can call it."""

import ctypes
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from var_kernels.native import build


def library(source: str, folder: Path) -> ctypes.CDLL:
    """Compiles `source` in `folder` and loads it. It is C++ that includes files of `csrc` by their path there.

    Skips the test if there is no compiler.
    """
    try:
        compiler = build.find_compiler()
    except build.BuildUnavailable as problem:
        pytest.skip(str(problem))
    file, result = folder / "host_code.cpp", folder / "host_code.so"
    file.write_text(source)
    command = f"{compiler.command} -std=c++20 -O1 -shared -fPIC -I{shlex.quote(str(build.CSRC))}"
    answer = subprocess.run([*shlex.split(command), str(file), "-o", str(result)], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return ctypes.CDLL(str(result))


def constant_statement(path: str, name: str) -> str:
    """The statement of `csrc/path` that defines the constant `name`, for files that a host compiler cannot compile."""
    text = (build.CSRC / path).read_text(encoding="utf-8")
    found = re.findall(rf"constexpr [^;{{}}()]*\b{name}(?:\[\])? = [^;]*;", text)
    assert len(found) == 1, f"{path}: expected one statement that defines {name}, got {found}"
    return found[0]
