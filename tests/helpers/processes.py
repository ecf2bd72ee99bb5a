"""Processes that a test starts, with pytest in them: their environment, and a quick way to start many."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path

# What every pytest here imports, which takes 3 of the 4 seconds before its first test. The package is not among them,
# because it reads its environment when it is imported, and because a process may test a copy of it.
_IMPORTED_BEFORE = ["torch", "torch._dynamo", "numpy", "pytest", "triton"]


def child_environment(*without: str, **changes: str) -> dict[str, str]:
    """This process's environment for another pytest, without the variables in `without` and with `changes`.

    Variables that mark this process as a worker of pytest-xdist are left out, because the other one is no worker, and
    pytest-benchmark measures nothing in a worker.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_") and name not in without}
    return kept | changes


@cache
def _forks() -> BaseContext:
    """The start method of processes that are forks of one process, which has imported what all of them need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_BEFORE)
    return context


def run_pytest(
    root: Path, arguments: Sequence[str], environment: dict[str, str], library: Path | None = None, timeout: float = 600
) -> subprocess.CompletedProcess:
    """Runs pytest in a process of its own, until its first failure, on the package and the tests in the folder `root`.

    With `library`, the package takes this file for its library that was built ahead of time.
    TimeoutError after `timeout` seconds.
    """
    arguments = ["-x", "-q", "-p", "no:cacheprovider", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        process = _forks().Process(target=_pytest, args=(root, arguments, environment, library, output))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"pytest {' '.join(arguments)}: more than {timeout} s\n{output.read_text()}")
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read_text(encoding="utf-8"))


def _pytest(root: Path, arguments: list[str], environment: dict[str, str], library: Path | None, output: Path) -> None:
    """The program of the process of `run_pytest`."""
    with output.open("w", encoding="utf-8") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in environment
    os.chdir(root)
    sys.path.insert(0, str(root))
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]  # this file, whose package is not that in `root`
    if library is not None:
        from var_kernels.native import build, load

        # The package accepts the library, because it has the build info of the sources without the fault.
        build.AHEAD_OF_TIME_LIBRARY = library
        assert load.native_library().path == library

    import pytest

    sys.exit(int(pytest.main(arguments)))
