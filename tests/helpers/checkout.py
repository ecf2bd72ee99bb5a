"""A copy of the package's build and loader with a ``csrc`` that compiles in a second, for runs in fresh processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from var_kernels.native import build

ROOT = Path(__file__).resolve().parents[2]

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
#ifndef __AMX_BF16__
#define __AMX_BF16__ 0
#endif
static_assert(!__FINITE_MATH_ONLY__, "NaN and infinity must behave");
namespace var_kernels::VAR_ISA {
int value() { return TINY_VALUE; }
// This is data, because every machine can read it, but not run code for another instruction set.
extern const int macros[] = {__AVX2__, __FMA__, __F16C__, __AVX512DQ__, __AVX512BF16__, __AMX_BF16__};
}
"""
TINY_DISPATCH = """
#ifdef VAR_ISA_X86
#define LEVELS(X) X(portable) X(avx2) X(avx512) X(avx512_bf16) X(amx)
#else
#define LEVELS(X) X(portable)
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))
#define LEVEL(name) namespace var_kernels::name { int value(); extern const int macros[]; } \\
  EXPORT int macro_##name(int i) { return var_kernels::name::macros[i]; }
LEVELS(LEVEL)
EXPORT int tiny_value() { return var_kernels::portable::value(); }
EXPORT const char* var_kernels_isa() { return "portable"; }
EXPORT int var_kernels_vector_width() { return 4; }
"""

LOAD = """
import ctypes, json, warnings
from var_kernels.native import load
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    status = load.native_library()
    assert load.native_library() is status
value = ctypes.CDLL(str(status.path)).tiny_value() if status.available else None
print(json.dumps(dict(available=status.available, reason=status.reason, origin=status.origin, path=str(status.path),
                      value=value, warnings=[str(w.message) for w in caught])))
"""


def has_compiler():
    try:
        return bool(build.find_compiler())
    except build.BuildUnavailable:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")


class Checkout:
    """A copy of the package in a directory of its own, with its own cache."""

    def __init__(self, root: Path):
        self.root, self.cache = root / "checkout", root / "cache"
        self.package, self.csrc = self.root / "var_kernels", self.root / "csrc"
        self.package.mkdir(parents=True)
        (self.package / "native").mkdir()
        for name in ("__init__.py", "build.py", "cache.py", "load.py"):
            shutil.copy(ROOT / "var_kernels/native" / name, self.package / "native" / name)
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
        """What ``load.native_library()`` returns in a fresh process, and the ``stderr`` of that process."""
        return self.answer(self.start("-c", LOAD, **changes))

    @staticmethod
    def answer(process: subprocess.Popen) -> dict:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        return json.loads(stdout) | {"stderr": stderr}

    def build_in_place(self) -> Path:
        process = self.start(str(self.package / "native/build.py"))
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        return self.package / build.LIBRARY_NAME

    def edit(self, value: int) -> None:
        """Changes the header that the vector code includes, and keeps its old time, as restoring a file does."""
        (self.csrc / "tiny.h").write_text(f"#define TINY_VALUE {value}\n")
        os.utime(self.csrc / "tiny.h", (1e9, 1e9))


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without the settings of the package, plus `changes`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VAR_KERNELS_", "PYTHON"))}
    return kept | {"OMP_NUM_THREADS": "1"} | changes
