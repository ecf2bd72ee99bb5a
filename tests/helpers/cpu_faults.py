"""Builds the native library with a planted fault in a CPU kernel, and runs tests with it.

A build of the whole library takes a minute, so only the objects that contain the fault are compiled again, for one
instruction set, and linked with those of the library without a fault.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import cached_property
from pathlib import Path

import filelock

from tests.helpers.processes import child_environment, run_pytest
from tests.tiers import ROOT
from tools.gpu_emulation.planted_faults import Mutant
from var_kernels.native import build, cache


class FaultyLibraries:
    """Makes libraries in `folder`. `level` is the instruction set that has the fault, and with which the tests run."""

    def __init__(self, folder: Path, level: str) -> None:
        self._folder, self.level = folder, level
        torch = build.require_torch(build.find_torch())
        objects = build.object_dir(cache.private_directory(cache.cache_root()), torch)
        objects.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(objects / "lock")):
            build.build(folder / build.LIBRARY_NAME, objects, mode="cpu", torch=torch)
            shutil.copytree(objects, folder / "objects", ignore=shutil.ignore_patterns("lock", "*.cu.o"))

    def _ninja(self, *arguments: str) -> str:
        command = [build.find_ninja(), "-C", str(self._folder / "objects"), "-t", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @cached_property
    def _commands(self) -> dict[str, str]:
        """The command that makes each file, by the name of the file."""
        lines = [line for line in self._ninja("commands").splitlines() if " -o " in line]
        return {re.search(r" -o (\S+)", line).group(1): line for line in lines}

    @cached_property
    def _included(self) -> dict[str, set[str]]:
        """The files of `csrc` that each object is made from."""
        found: dict[str, set[str]] = {}
        for block in self._ninja("deps").split("\n\n"):
            name, *lines = block.strip().splitlines() or [""]
            found[name.partition(":")[0]] = {line.strip() for line in lines}
        return found

    def _objects_with(self, mutant: Mutant) -> list[str]:
        """The objects of the op that `mutant.check` tests which contain the file with the fault."""
        parts = mutant.check.partition("::")[0].split("/")
        op = parts[0] if parts[0] != "inference" else parts[1].removeprefix("test_").removesuffix(".py")
        file = str(build.CSRC / "cpu" / mutant.file)
        return [
            name for name, files in self._included.items()
            if file in files and name.startswith(op) and name.endswith((f".{self.level}.o", ".entry.o"))
        ]  # fmt: skip

    def build(self, mutant: Mutant) -> Path:
        """The library with this fault."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        csrc = Path(shutil.copytree(build.CSRC, folder / "csrc"))
        changed = self._objects_with(mutant)
        if not changed:
            raise ValueError(f"{mutant.check}: expected an op that uses {mutant.file}, found no object")
        with mutant.planted(csrc / "cpu"):
            for name in changed:
                # Optimising less takes half of the time, and the arithmetic stays the same.
                command = self._commands[name].replace(str(build.CSRC), str(csrc)).replace("-O3", "-O1")
                subprocess.run(command, shell=True, cwd=folder, check=True)
        link = self._commands[build.LIBRARY_NAME]
        for name in self._commands:
            if name.endswith(".o") and name not in changed:
                link = link.replace(f" {name} ", f" {self._folder / 'objects' / name} ")
        subprocess.run(link, shell=True, cwd=folder, check=True)
        return folder / build.LIBRARY_NAME

    def run(self, library: Path, *tests: str) -> subprocess.CompletedProcess:
        """Runs tests, "file.py::function" in `tests/kernels`, with this library until the first failure."""
        arguments = [f"tests/kernels/{test}" for test in tests]
        return run_pytest(ROOT, arguments, child_environment(VAR_KERNELS_ISA=self.level), library)
