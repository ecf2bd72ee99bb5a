"""The machinery of the benchmarks: it refuses wrong results, shows missing peers and computes its figures correctly."""

import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import clock, fair_malloc, harness, plain_mode, table
from benchmarks.peaks import Peak, Peaks
from tests.helpers.processes import child_environment

ROOT = Path(__file__).parents[2]
MODULES = sorted(f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("bench_*.py"))
on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings exist only in glibc's malloc")

# Providers that are right, wrong, absent and broken. Each call writes a line to the file CALLS.
TOY = """
import os
import torch
from benchmarks.harness import Case, Unavailable, compiled, judge_floats
from benchmarks.table import Work

def provider(name, function):
    def make(x):
        def call():
            with open(os.environ["CALLS"], "a") as file:
                file.write(name + "\\n")
            return function(x)
        return call
    return make

def absent(x):
    import a_package_that_nobody_has

def unable(x):
    raise Unavailable("not on this machine")

def broken(x):
    raise RuntimeError("a bug\\nin detail")

PROVIDERS = {
    "var_kernels": provider("var_kernels", lambda x: x + 1),
    "eager": provider("eager", lambda x: x + 1),
    "off by one row": provider("off by one row", lambda x: (x + 1).roll(1, 0)),
    "two results": provider("two results", lambda x: (x + 1, x)),
    "absent": absent,
    "unable": unable,
    "broken": provider("broken", broken),
    "slow to compile": compiled(provider("slow to compile", lambda x: x + 1)),
}

def judge(x):
    return judge_floats({"y": x.double() + 1}, {"y": x + 1})

CASES = (
    Case("toy", "A", "smoke", lambda: torch.randn(50, 8), PROVIDERS, "eager", judge, Work(400, "FLOP", "fp32"),
         missing={"unwritten": "nobody wrote it"}),
    Case("toy", "B", "quick", lambda: torch.randn(50, 8), PROVIDERS, "eager", judge, Work(400, "FLOP")),
)

def test_toy(duel):
    duel()
"""


def run_toy(directory: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    (directory / "bench_toy.py").write_text(TOY)
    # Every pytest process loads this: the first one, and the one that replaces it, write a line each.
    (directory / "conftest.py").write_text(
        "import os\n"
        "with open(os.environ['STARTS'], 'a') as file:\n"
        "    print(os.getpid(), os.environ.get('GLIBC_TUNABLES', ''), file=file)\n"
    )
    files = {"CALLS": str(directory / "calls"), "STARTS": str(directory / "starts"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", "-p", "no:cacheprovider", "-q", "--smoke"]
    return subprocess.run(
        [*command, "--rootdir", str(directory), "--benchmark-only", str(directory / "bench_toy.py"), *options],
        env=child_environment("GLIBC_TUNABLES", **files, **environment), capture_output=True, text=True, cwd=directory,
    )  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("toy")
    answer = run_toy(directory, "--benchmark-json", str(directory / "out.json"), GLIBC_TUNABLES="glibc.malloc.check=0")
    assert answer.returncode == 1, answer.stdout + answer.stderr
    return SimpleNamespace(
        out=answer.stdout,
        json=json.loads((directory / "out.json").read_text()),
        calls=(directory / "calls").read_text().splitlines(),
        starts=[line.split(" ", 1) for line in (directory / "starts").read_text().splitlines()],
    )


def test_a_wrong_provider_is_refused_before_timing(toy):
    assert toy.calls.count("off by one row") == toy.calls.count("two results") == 1  # compared once, never timed
    timed = {bench["extra_info"]["provider"] for bench in toy.json["benchmarks"] if bench.get("stats")}
    assert timed == {"var_kernels", "eager"}
    assert "2 failed, 2 passed, 4 skipped" in toy.out
    assert any("off by one row" in line and "REFUSED, wrong result: y:" in line for line in toy.out.splitlines())
    assert any("two results" in line and "REFUSED, wrong result: expected the results y" in line
               for line in toy.out.splitlines())  # fmt: skip


def test_a_missing_peer_is_listed_with_the_reason(toy):
    lines = toy.out.split("side by side")[1].splitlines()

    def row(provider):
        return next(line for line in lines if line.strip().startswith(provider))

    assert "not measured: not installed: No module named 'a_package_that_nobody_has'" in row("absent")
    assert "not measured: not on this machine" in row("unable")
    assert "not measured: RuntimeError: a bug in detail" in row("broken")
    assert "not measured: compiles at its first call" in row("slow to compile")
    assert "not measured: nobody wrote it" in row("unwritten")


def test_a_call_of_the_baseline_directly_precedes_each_timed_call(toy):
    ours = [i for i, name in enumerate(toy.calls) if name == "var_kernels"]
    timed = ours[1:-5]  # without the call that is compared and those that count page faults
    assert len(timed) >= 2 + 7
    assert all(toy.calls[i - 1] == "eager" for i in timed)


def test_the_json_file_has_peaks_ratios_and_the_machine(toy):
    assert set(toy.json["peaks"]) == {"fp32", "bf16", "copy"}
    assert all(peak["value"] > 0 and peak["how"] for peak in toy.json["peaks"].values())
    assert {"torch", "torch_threads", "var_kernels_isa", "malloc"} <= set(toy.json["machine_info"])
    ours = next(bench for bench in toy.json["benchmarks"] if bench["extra_info"]["provider"] == "var_kernels")
    assert ours["group"] == "toy, A"
    assert {"ratio", "max_error", "faults_per_call", "GFLOP/s", "baseline"} <= set(ours["extra_info"])


@on_glibc
def test_pytest_is_restarted_once_in_fair_mode(toy):
    (first, before), (second, after) = toy.starts
    assert first == second  # the restart keeps the process, so that a caller sees one exit status
    assert before.strip() == "glibc.malloc.check=0"
    assert after.strip().split(":") == ["glibc.malloc.check=0", *fair_malloc.TUNABLES]
    assert "fair allocation" in toy.out


@on_glibc
def test_no_restart_where_it_would_replace_another_program(monkeypatch):
    def refuse(*_):
        raise AssertionError("restarted")

    monkeypatch.setattr(os, "execve", refuse)
    monkeypatch.setattr(sys, "argv", ["pytest", "benchmarks"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)

    def config(arguments=("benchmarks",), collectonly=False, **attributes):
        option = SimpleNamespace(collectonly=collectonly)
        manager = SimpleNamespace(getplugin=lambda name: None)
        parameters = SimpleNamespace(args=arguments)
        return SimpleNamespace(option=option, invocation_params=parameters, pluginmanager=manager, **attributes)

    fair_malloc.restart_if_needed(config(arguments=("other",)))  # pytest.main called by some program
    fair_malloc.restart_if_needed(config(collectonly=True))
    fair_malloc.restart_if_needed(config(workerinput={}))
    with pytest.raises(AssertionError, match="restarted"):
        fair_malloc.restart_if_needed(config())
    monkeypatch.setenv("GLIBC_TUNABLES", ":".join(fair_malloc.TUNABLES))
    fair_malloc.restart_if_needed(config())


def test_environments_keep_the_tunables_of_the_user(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    fair = fair_malloc.fair_environment()["GLIBC_TUNABLES"]
    assert fair == ":".join(("glibc.malloc.check=0", *fair_malloc.TUNABLES))
    monkeypatch.setenv("GLIBC_TUNABLES", fair)
    assert fair_malloc.is_fair()
    assert fair_malloc.fair_environment()["GLIBC_TUNABLES"] == fair
    assert fair_malloc.plain_environment()["GLIBC_TUNABLES"] == "glibc.malloc.check=0"
    monkeypatch.setenv("GLIBC_TUNABLES", ":".join(fair_malloc.TUNABLES))
    assert "GLIBC_TUNABLES" not in fair_malloc.plain_environment()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--full"], "--full and --smoke exclude each other"),
        (["--bench-threads", "0"], "expected a positive integer, got '0'"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: expected a GPU that this torch can use, found none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--bench-threads", "many"], "expected a positive integer, got 'many'"),
    ],
)
def test_bad_options_are_explained(tmp_path, options, message):
    answer = run_toy(tmp_path, *options)
    assert answer.returncode == 4  # pytest's status for wrong usage
    assert message in answer.stdout + answer.stderr


class _FixedPeaks(Peaks):
    def get(self, name: str, copied_bytes: int = 0) -> Peak:
        return Peak({"fp32": 400.0, "bf16": 800.0, "copy": 40.0}[name], "fixed")


def test_the_arithmetic_of_the_table():
    peaks = _FixedPeaks()
    flops, traffic = table.Work(2e9, "FLOP", "fp32"), table.Work(1e9, "B", "copy")
    assert flops.rate(0.01) == pytest.approx(200) and flops.share(0.01, peaks) == pytest.approx(0.5)
    assert traffic.rate(0.05) == pytest.approx(20) and traffic.share(0.05, peaks) == pytest.approx(0.5)
    assert table.Work(8, "images").rate(2) == 4 and table.Work(8, "images").share(2, peaks) is None
    row = table.Row("x", (1.0, 2.0, 3.0, 4.0, 5.0))
    assert row.median == 3 and row.iqr == 2
    # The ratio is taken pair by pair, where a burst that hits both halves of a pair cancels. The ratio of the medians
    # of all rounds would not be 2.
    timing = harness.Timing(seconds=(1.0, 10.0, 1.0), baseline=(2.0, 20.0, 9.0), faults=0)
    assert timing.ratio == 2 and timing.median == 1
    assert [table.format_seconds(s) for s in (2.5, 0.0123, 4.5e-5)] == ["2.5 s", "12.3 ms", "45 µs"]
    with pytest.raises(ValueError, match="limit: expected fp32, bf16, copy or None, got 'l2'"):
        table.Work(1, "B", "l2")


def test_the_lines_of_a_case():
    rows = [
        table.Row("eager", (0.02,) * 5, 1.0, 1e-6, 3.0),
        table.Row("slower", (0.04,) * 5, 0.5, 2e-6, 0.0),
        table.Row("var_kernels", (0.01,) * 5, 2.0, 1e-7, 0.0),
        table.Row("gone", note="not measured: why"),
    ]
    title, header, columns, *lines = table.case_lines(
        "op, shape", "eager", table.Work(2e9, "FLOP", "fp32"), rows, _FixedPeaks(), [("flex", "no backward")]
    )
    assert title == "op, shape" and "× is against eager; limit 400 GFLOP/s (fp32: fixed)" in header
    assert columns.split() == "provider median IQR × GFLOP/s of limit max error faults".split()
    assert [line.split() for line in lines] == [
        "var_kernels 10 ms 0.0% 2.00x 200 50% 1.0e-07 0".split(),
        "eager 20 ms 0.0% 1.00x 100 25% 1.0e-06 3".split(),
        "slower 40 ms 0.0% 0.50x 50 12% 2.0e-06 0".split(),  # a case where we are slower is shown as well
        "gone not measured: why".split(),
        "flex not measured: no backward".split(),
    ]


def test_a_peer_may_sum_naively_and_we_may_not():
    exact = torch.full((4, 16), 80.0, dtype=torch.float64)
    plain, naive = exact.float() + 1e-5, exact.float() + 1e-4
    judge = harness.judge_floats({"dscale": exact}, {"dscale": plain})
    assert judge(naive, peer=True) == pytest.approx(1e-4, rel=0.1)
    with pytest.raises(AssertionError, match="dscale: .* off by more"):
        judge(naive)


def test_measure_interleaves_and_counts_faults():
    log = []
    timing = harness.measure(lambda: log.append("b"), lambda: log.append("a"), budget=0.0)
    assert len(timing.seconds) == len(timing.baseline) == 7
    assert log[:18] == ["a", "b"] * 9
    page = 4096
    fresh = fair_malloc.faults_per_call(lambda: torch.zeros(64 << 20, dtype=torch.uint8).fill_(1), calls=1)
    assert fresh == 0 or fresh > (64 << 20) / (512 * page)  # no faults, or one for each page, which may be huge


class _FakeEvents:
    """Stands for CUDA events on a machine without a GPU: each record takes the next of the given times, in ms."""

    def __init__(self, monkeypatch, log):
        self.times = iter(range(0, 10**6, 5))

        class Event:
            def __init__(event, enable_timing):
                assert enable_timing

            def record(event):
                log.append("record")
                event.time = next(self.times)

            def synchronize(event):
                log.append("synchronize")

            def elapsed_time(event, end):
                return end.time - event.time

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(clock.CudaClock, "device", "cpu")


def test_a_gpu_is_timed_by_events_after_a_flush(monkeypatch):
    log = []
    _FakeEvents(monkeypatch, log)
    gpu = clock.clock_for("cuda")
    gpu._flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    assert gpu.seconds(lambda: log.append("call")) == pytest.approx(5e-3)
    assert log == ["flush", "record", "call", "record", "synchronize"]
    leaf = torch.ones(2, requires_grad=True)
    placed = gpu.place((leaf, "name", torch.zeros(1, dtype=torch.bool)))
    assert placed[0].requires_grad and placed[0] is not leaf and placed[1] == "name" and not placed[2].requires_grad


def test_on_a_gpu_times_are_those_of_the_clock_and_not_of_the_host(monkeypatch):
    gpu = SimpleNamespace(device="cuda", seconds=lambda call: (call(), 0.5)[1])
    recorded = []

    def pedantic(function, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            recorded.append(function())

    benchmark = SimpleNamespace(disabled=False, pedantic=pedantic)
    log = []
    timing = harness.measure_with(benchmark, lambda: log.append("b"), lambda: log.append("a"), 0.0, gpu)
    assert timing.seconds == timing.baseline == (0.5,) * 7 and len(recorded) == 7
    assert log[:18] == ["a", "b"] * 9


def test_providers_and_cases_for_one_device_run_only_there():
    providers = {"a": lambda x: x, "b": harness.only_on("cuda")(lambda x: x), "c": harness.only_on("cpu")(lambda x: x)}
    case = harness.Case("g", "n", "quick", None, providers, "a", None, table.Work(1, "B"), devices=("cuda",))
    assert case.providers_on("cpu") == ["a", "c"] and case.providers_on("cuda") == ["a", "b"]
    assert case.runs_in("full", "cuda") and not case.runs_in("quick", "cpu") and not case.runs_in("smoke", "cuda")


def test_the_reference_is_never_timed_under_our_name(monkeypatch):
    only_reference = {"reference": None}
    monkeypatch.setattr("var_kernels.backends.unavailable_reason", lambda name, *_: only_reference.get(name, "no"))
    with pytest.raises(harness.Unavailable, match="cpu: no; cuda: no"):
        harness.kernel_backend("nearest_code", "cuda")


def test_a_case_with_a_wrong_name_in_it_is_refused():
    arguments = dict(group="g", name="n", inputs=None, providers={"a": None}, judge=None, work=table.Work(1, "B"))
    with pytest.raises(ValueError, match="tier: expected one of smoke, quick, full, got 'fast'"):
        harness.Case(tier="fast", baseline="a", **arguments)
    with pytest.raises(ValueError, match="baseline: expected one of a, got 'b'"):
        harness.Case(tier="quick", baseline="b", **arguments)


@pytest.mark.parametrize("module", MODULES)
def test_every_benchmark_refuses_zeros_and_shifted_rows(module):
    cases = importlib.import_module(module).CASES
    assert len({case.title for case in cases}) == len(cases)
    for device in ("cpu", "cuda"):
        assert all(any(case.runs_in(tier, device) for case in cases) for tier in harness.TIERS)
        assert all({harness.OURS, case.baseline} <= set(case.providers_on(device)) for case in cases)
    for case in [case for case in cases if case.tier == "smoke"]:
        try:
            inputs = case.inputs()
        except harness.Unavailable as reason:
            pytest.skip(str(reason))
        judge = case.judge(inputs)
        right = harness.prepare(case, case.baseline, inputs)()
        judge(right)
        results = (right,) if isinstance(right, torch.Tensor) else tuple(right)
        for i, result in enumerate(results):
            for wrong in (torch.zeros_like(result), result.roll(1, -1), result[:1]):
                spoiled = (*results[:i], wrong, *results[i + 1 :])
                for peer in (False, True):
                    with pytest.raises(AssertionError):
                        judge(spoiled[0] if len(results) == 1 else spoiled, peer)


def test_plain_mode_measures_in_a_process_of_its_own():
    module = importlib.import_module("benchmarks.bench_nearest_code")
    case = next(case for case in module.CASES if case.tier == "smoke")
    try:
        harness.prepare(case, harness.OURS, case.inputs())
    except harness.Unavailable as reason:
        pytest.skip(str(reason))
    result = plain_mode.run([(module.__name__, case)], budget=0.01, threads=1)[case.title]
    assert result["ours"]["median"] > 0 and result["baseline"]["faults"] >= 0
    assert plain_mode.line(result, case.baseline).startswith("  plain allocation: var_kernels ")
    assert plain_mode.run([], budget=1, threads=1) == {}
