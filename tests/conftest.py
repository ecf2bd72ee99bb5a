"""Fixtures that the tests of all ops share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from var_kernels.backends import unavailable_reason
from var_kernels.testing import isa_levels

# Of the randomised tests; `--hypothesis-profile=long` for ten minutes of test_cpu_differential.py.
settings.register_profile("brief", max_examples=15, derandomize=True)
settings.register_profile("long", max_examples=2000)
settings.load_profile("brief")


@pytest.fixture
def cpu():
    """Skips where the native library, which serves all ops together, is not available."""
    reason = unavailable_reason("cpu", "cpu", "block_causal_attention")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def run_at_lower_level(cpu, request):
    """`run(file, expression)`: the tests of a file that pytest's -k selects pass at a lower ISA level, none skipped.

    In a process of their own; skips where this process is at that level, or below it.
    """
    level = request.param
    if level not in isa_levels()[:-1]:
        pytest.skip(f"{level} is not below the level of this process")

    def run(file, expression):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file), "-k", expression]
        root, environment = Path(__file__).resolve().parents[1], {**os.environ, "VAR_KERNELS_ISA": level}
        answer = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        assert answer.returncode == 0 and "skipped" not in answer.stdout, answer.stdout[-3000:] + answer.stderr[-2000:]

    return run


@pytest.fixture
def peak_growth():
    """`peak_growth(preparation, measured)`: bytes by which the second program raises the peak of the first one.

    In a process of its own, whose peak is Linux' VmHWM: `ru_maxrss` of a child begins with the size of its parent. With
    `mmap_threshold`, glibc's malloc returns whatever has more bytes to the system at once, so that the peak is that of
    what is in use; without it, some 10 MiB of it may be gaps between what is in use, which differ from run to run.
    """
    if sys.platform != "linux":
        pytest.skip("VmHWM is Linux'")

    def run(preparation, measured, mmap_threshold=None):
        peak = "int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
        program = f"{preparation}\nbefore = {peak}\n{measured}\nprint({peak} - before)\n"
        command = [sys.executable, "-c", program]
        environment = dict(os.environ)
        if mmap_threshold is not None:
            environment["GLIBC_TUNABLES"] = f"glibc.malloc.mmap_threshold={mmap_threshold}"
        answer = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return int(answer.stdout.split()[-1]) << 10

    return run


@pytest.fixture
def selected(request):
    """The values of one parameter of the test with which this run calls it: what is slow to make, compiled code say, is
    made for all of them together."""

    def values(parameter):
        items = (item for item in request.session.items if getattr(item, "function", None) is request.function)
        return tuple(dict.fromkeys(item.callspec.params[parameter] for item in items))

    return values


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("cpu")
    return request.param


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Directory of a data set for trainings of a second."""
    from tiny_training import write_fashion_mnist

    directory = tmp_path_factory.mktemp("fashion")
    write_fashion_mnist(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, data):
    """Run directory of a finished tokenizer training of 8 steps."""
    from tiny_training import tokenizer_options

    from var.train_tokenizer import train_tokenizer

    output = tmp_path_factory.mktemp("runs") / "tokenizer"
    assert train_tokenizer(tokenizer_options(output, data)).reason == "finished"
    return output
