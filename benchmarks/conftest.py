"""The options of the benchmarks, and the restart with fair allocation.

Code that needs torch is in plugin.py, because importing torch takes seconds and the restart comes first.
"""

from __future__ import annotations

import argparse

import pytest

from . import fair_malloc


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("var_kernels benchmarks")
    group.addoption("--full", action="store_true", help="all shapes, and more rounds")
    group.addoption("--smoke", action="store_true", help="tiny shapes, nothing compiled: a check of the benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (cuda: AMD GPUs as well)")
    group.addoption("--no-record", action="store_true", help="on a GPU: do not let the result change the order of auto")
    group.addoption("--bench-threads", type=_positive, metavar="N", help="threads of torch (default: its own choice)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if not hasattr(option, "smoke"):
        # pytest found this file while it collected another directory: options are fixed, and no benchmark was asked
        # for.
        return
    if option.full and option.smoke:
        raise pytest.UsageError("--full and --smoke exclude each other")
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install 'var-kernels[bench]'")
    if option.device == "cpu":
        fair_malloc.restart_if_needed(config)
    # The table of the benchmarks says more than pytest-benchmark's, which is needed only for these options.
    if not (option.benchmark_histogram or option.benchmark_compare or option.benchmark_cprofile):
        option.benchmark_quiet = True
    from .plugin import BenchmarkPlugin

    config.pluginmanager.register(BenchmarkPlugin(config), "var_kernels_benchmarks")
