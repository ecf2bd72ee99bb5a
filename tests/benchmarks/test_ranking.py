"""How a GPU run of the benchmarks ranks our backends and records the ranking for later processes.

The GPU is a stand-in, whose clock reads the seconds that each provider names."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, plugin, ranking, table
from tests.helpers.processes import child_environment
from var_kernels import backends
from var_kernels.measured import speeds
from var_kernels.measured.speeds import Speeds

ROOT = Path(__file__).parents[2]
NAME = "Stand-in GPU"

STAND_IN = """
import torch
from benchmarks import clock, peaks

class StandInClock:
    device = "cuda"

    def place(self, inputs):
        return inputs

    def seconds(self, call):
        call()
        return call.seconds

torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "Stand-in GPU"
torch.cuda.get_device_capability = lambda: (9, 0)
clock.clock_for = lambda device: StandInClock()
peaks.Peaks.get = lambda self, name, copied_bytes=0: peaks.Peak(1.0, "stand-in")
"""

TOY = """
import torch
from benchmarks.harness import Case, judge_floats
from benchmarks.table import Work

def provider(seconds, error=0.0):
    def make(x):
        def call():
            return x + 1 + error
        call.seconds = seconds
        return call
    return make

def case(op, name, tier, cuda, triton, **wrong):
    providers = {"eager": provider(1.0), "var_kernels": provider(cuda), "var_kernels (cuda)": provider(cuda, **wrong),
                 "var_kernels (triton)": provider(triton)}
    return Case(op, name, tier, lambda: torch.randn(50, 8), providers, "eager",
                lambda x: judge_floats({"y": x.double() + 1}, {"y": x + 1}), Work(400, "FLOP"), devices=("cuda",),
                op=op)

CASES = (
    case("nearest_code", "A", "quick", 0.5, 0.25),
    case("nearest_code", "B", "quick", 0.125, 0.25),
    case("nearest_code", "C", "quick", 0.5, 0.125),
    case("adaln_layer_norm", "A", "quick", 0.5, 0.25, error=1.0),
    case("gated_residual_adaln", "A", "quick", 0.25, 0.5),
    case("gated_residual_adaln", "B", "full", 0.5, 0.25),
    case("", "generation", "quick", 0.25, 0.5),
)

def test_toy(duel):
    duel()
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_run_on_a_gpu_changes_the_order_of_later_processes(cache, tmp_path):
    (tmp_path / "conftest.py").write_text(STAND_IN)
    (tmp_path / "bench_toy.py").write_text(TOY)
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-p", "no:cacheprovider", "-q"]
    answer = subprocess.run(
        [*command, "--rootdir", tmp_path, "--benchmark-only", "--device", "cuda", tmp_path / "bench_toy.py"],
        env=child_environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert answer.returncode == 1 and "1 failed, 23 passed" in answer.stdout, answer.stdout + answer.stderr
    lines = answer.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("our GPU backends, by op"))
    path = speeds.path_of(NAME)
    # nearest_code has the geometric means (2·8·2)^(1/3) for cuda and (4·4·8)^(1/3) for triton. A wrong result, as in
    # adaln_layer_norm, is never ranked.
    assert lines[at + 1 : at + 5] == [
        "  nearest_code: cuda 3.17×, triton 5.04× (3 cases): triton comes first",
        "  gated_residual_adaln: cuda 4×, triton 2× (1 cases): cuda stays first",
        "  adaln_layer_norm: not ranked, because not timed: cuda in 1 of 1 cases",
        f'recorded in {path}: later processes on this kind of GPU follow it in "auto" until it is deleted',
    ]
    recorded = speeds.read(NAME, backends.GPU_BACKENDS)
    assert set(recorded) == {"nearest_code", "gated_residual_adaln"}
    assert recorded["nearest_code"].speeds == pytest.approx({"cuda": 32 ** (1 / 3), "triton": 128 ** (1 / 3)})


def session(monkeypatch, **options) -> plugin.BenchmarkPlugin:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(plugin, "clock_for", lambda device: None)
    settings = {"full": False, "smoke": False, "no_record": False, "device": "cuda", "bench_threads": None, **options}
    ignored = SimpleNamespace(option=SimpleNamespace(**settings), addinivalue_line=lambda *line: None)
    return plugin.BenchmarkPlugin(ignored)


def case(op: str, name: str = "A") -> harness.Case:
    return harness.Case(op, name, "quick", None, {"eager": None}, "eager", None, table.Work(1, "B"), op=op)


def rows(**ratios: float) -> list[table.Row]:
    return [table.Row(harness.by_backend(name), (1.0,), ratio) for name, ratio in ratios.items()]


def report(benchmarks: plugin.BenchmarkPlugin) -> list[str]:
    printed = []
    benchmarks._report_ranking(SimpleNamespace(line=printed.append))
    return printed[2:]


@pytest.mark.parametrize(
    ("options", "reason"), [({"no_record": True}, "--no-record"), ({"smoke": True}, "--smoke"), ({}, None)]
)
def test_a_ranking_is_recorded_unless_an_option_forbids_it(cache, monkeypatch, options, reason):
    benchmarks = session(monkeypatch, **options)
    benchmarks.cases = [case("nearest_code")]
    benchmarks.duel_of_session.rows["nearest_code, A"] = rows(cuda=1.0, triton=1.04)
    ranked, recorded = report(benchmarks)
    assert ranked == "  nearest_code: cuda 1×, triton 1.04× (1 cases): cuda stays first"
    if reason is not None:
        assert recorded == f"not recorded: {reason}" and not cache.exists()
    else:
        assert recorded.startswith("recorded in ")
        assert speeds.read(NAME, backends.GPU_BACKENDS)["nearest_code"].cases == 1


def test_an_op_with_untimed_cases_is_not_ranked(cache, monkeypatch):
    benchmarks = session(monkeypatch)
    benchmarks.cases = [case("nearest_code"), case("nearest_code", "B"), case("adaln_layer_norm")]
    benchmarks.duel_of_session.rows["nearest_code, A"] = rows(cuda=1.0, triton=2.0)  # as with -k A
    assert report(benchmarks) == [
        "  nearest_code: not ranked, because not timed: cuda in 1 of 2 cases, triton in 1 of 2 cases",
        "not recorded: nothing was ranked",
    ]
    assert not cache.exists()


def test_an_op_without_gpu_kernels_is_not_ranked(cache, monkeypatch):
    benchmarks = session(monkeypatch)
    benchmarks.cases = [case("packed_linear")]
    benchmarks.duel_of_session.rows["packed_linear, A"] = [table.Row(harness.OURS, (1.0,), 2.0)]
    assert ranking.rank(benchmarks.cases, benchmarks.duel_of_session.rows) == ({}, {})


def test_earlier_measurements_of_other_ops_are_kept(cache, monkeypatch):
    session(monkeypatch)
    old = {"nearest_code": Speeds({"cuda": 1.0, "triton": 2.0}, 3),
           "adaln_layer_norm": Speeds({"cuda": 1.0, "triton": 2.0}, 3)}  # fmt: skip
    new = {"adaln_layer_norm": Speeds({"cuda": 3.0, "triton": 2.0}, 4)}
    speeds.write(NAME, old)
    assert ranking.record(new).startswith("recorded in ")
    assert speeds.read(NAME, backends.GPU_BACKENDS) == old | new
    speeds.path_of(NAME).write_text("damaged")
    assert ranking.record(new).startswith("recorded in ") and speeds.read(NAME, backends.GPU_BACKENDS) == new


def test_an_unwritable_cache_is_reported_in_a_line(tmp_path, monkeypatch):
    session(monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(tmp_path / "file"))
    assert ranking.record({}).startswith("not recorded: ")


def test_our_providers_name_the_backend(monkeypatch):
    served = {"cuda": None, "triton": "no Triton", "reference": None, "cpu": None}
    monkeypatch.setattr(backends, "unavailable_reason", lambda name, *_: served[name])
    providers = harness.our_providers(lambda inputs, backend: lambda: (inputs, backend), "nearest_code")
    assert tuple(providers) == harness.OUR_PROVIDERS
    inputs = (torch.ones(1), "text")
    assert providers["var_kernels"](inputs)() == (inputs, "auto")
    assert providers["var_kernels (cuda)"](inputs)() == (inputs, "cuda")
    with pytest.raises(harness.Unavailable, match="no Triton"):
        providers["var_kernels (triton)"](inputs)
    served |= {"cuda": "no", "cpu": "no"}
    with pytest.raises(harness.Unavailable, match="cpu: no; cuda: no; triton: no Triton"):
        providers["var_kernels"](inputs)
