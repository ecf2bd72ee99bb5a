"""Options and fixtures that all tests share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests import tiers
from var_kernels.backends import unavailable_reason

# Profiles of the randomised tests. With `--hypothesis-profile=long`, test_cpu_differential.py takes ten minutes.
settings.register_profile("brief", max_examples=15, derandomize=True)
settings.register_profile("long", max_examples=2000)
settings.load_profile("brief")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests of all tiers, not only what every edit needs")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A run of all tests, which names none, uses two workers of pytest-xdist; `-n 0` uses none."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # a worker is called with the same arguments, and must not start workers of its own
    option = config.option
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not (option.collectonly or option.usepdb)
    if whole and (os.cpu_count() or 1) > 1 and getattr(option, "numprocesses", 0) is None and option.capture != "no":
        option.numprocesses, option.dist = 2, "worksteal"


def pytest_configure(config):
    for tier, what in tiers.TIERS.items():
        config.addinivalue_line("markers", f"{tier}: {what}")
    # The workers of pytest-xdist share the processors. Processes that tests start read OMP_NUM_THREADS.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    tiers.mark(items)
    tiers.long_ones_first(items)
    if config.option.all or config.option.markexpr:
        return
    named = {(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args}
    left_out = [item for item in items if tiers.is_left_out(item, named)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        kept = set(items) - set(left_out)
        items[:] = [item for item in items if item in kept]


def pytest_terminal_summary(terminalreporter, config):
    if config.args_source == pytest.Config.ArgsSource.TESTPATHS and not (config.option.all or config.option.markexpr):
        terminalreporter.write_line(
            f"tests of the tiers {', '.join(tiers.TIERS)} were left out: `pytest --all` runs them too, "
            "`pytest -m emulated` one tier, and a file that is named runs whole"
        )


@pytest.fixture
def cpu():
    """Skips the test if the native library, which has the CPU kernels of all ops, is not available."""
    reason = unavailable_reason("cpu", "cpu", "block_causal_attention")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def peak_growth():
    """`peak_growth(preparation, measured)`: by how many bytes the program `measured` raises the peak memory.

    Both programs run in one process of their own, `preparation` first. The peak is VmHWM of Linux, because `ru_maxrss`
    of a child process begins with the size of its parent. With `mmap_threshold`, glibc's malloc returns larger blocks
    to the system as soon as they are freed, so that the peak counts only memory in use. Without it, some 10 MiB of the
    peak may be gaps between blocks in use, which differ from run to run.
    """
    if sys.platform != "linux":
        pytest.skip("VmHWM exists only on Linux")

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
    """`selected(parameter)`: the values of a parameter of the test that this run selects.

    With it, a test makes what is slow to make, such as compiled code, for all these values together.
    """

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
    """The directory of a data set on which a training takes a second."""
    from tests.helpers.training import write_fashion_mnist

    directory = tmp_path_factory.mktemp("fashion")
    write_fashion_mnist(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, data):
    """The run directory of a finished tokenizer training of 8 steps."""
    from tests.helpers.training import tokenizer_options
    from var.training.tokenizer import train_tokenizer

    output = tmp_path_factory.mktemp("runs") / "tokenizer"
    assert train_tokenizer(tokenizer_options(output, data)).reason == "finished"
    return output
