"""The pytest plugin of the benchmarks: one test for each case and provider, and the table at the end."""

from __future__ import annotations

import logging

import pytest
import torch

from var_kernels.native import load

from . import fair_malloc, plain_mode, ranking
from .clock import clock_for
from .harness import OURS, Case, Duel, Unavailable
from .peaks import Peaks
from .table import case_lines

_SECONDS = {"smoke": 0.1, "quick": 1.0, "full": 3.0}  # for each provider, with the baseline's part of its rounds


class BenchmarkPlugin:
    """State and hooks of one session."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        # A refused provider is never timed, so pytest would warn; and traces of torch's compiler would hide the
        # refusal.
        config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
        logging.getLogger("torch.__trace").propagate = False
        if option.bench_threads:
            torch.set_num_threads(option.bench_threads)
        self.device = option.device
        if self.device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: expected a GPU that this torch can use, found none")
        self.tier = "full" if option.full else "smoke" if option.smoke else "quick"
        self.duel_of_session = Duel(tier=self.tier, budget=_SECONDS[self.tier], clock=clock_for(self.device))
        self.peaks = Peaks(self.duel_of_session.clock)
        self.no_record = "--smoke" if option.smoke else "--no-record" if option.no_record else None
        self.cases: list[Case] = []  # all cases of this run, whether or not their tests are selected
        self.modules: dict[str, str] = {}  # the module of each case, by its title
        self.plain: dict[str, dict] = {}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Makes a test for every (case, provider) of the module's CASES in this run; those of one case are in a row."""
        cases = getattr(metafunc.module, "CASES", None)
        if cases is None or "duel" not in metafunc.fixturenames:
            return
        cases = [case for case in cases if case.runs_in(self.tier, self.device)]
        self.cases += cases
        pairs = [(case, provider) for case in cases for provider in case.providers_on(self.device)]
        ids = [f"{case.title}-{provider}".replace(" ", "_") for case, provider in pairs]
        metafunc.parametrize("duel", pairs, ids=ids, indirect=True)

    @pytest.fixture
    def duel(self, request: pytest.FixtureRequest, benchmark):
        """A function that checks and times the (case, provider) of this test."""
        case, provider = request.param
        self.modules[case.title] = request.module.__name__

        def run() -> None:
            try:
                self.duel_of_session.run(case, provider, benchmark)
            except Unavailable as reason:
                pytest.skip(str(reason))

        return run

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Measures the headline cases once more without fair allocation."""
        if self.device != "cpu" or not fair_malloc.is_fair():
            return
        duel = self.duel_of_session
        cases = [(self.modules[title], case) for title, case in duel.cases.items() if self._is_timed(case)]
        self.plain = plain_mode.run(cases, budget=duel.budget, threads=torch.get_num_threads())

    def _is_timed(self, case: Case) -> bool:
        timed = {row.provider for row in self.duel_of_session.rows[case.title] if row.seconds}
        return case.headline and {OURS, case.baseline} <= timed

    def pytest_benchmark_update_machine_info(self, machine_info: dict) -> None:
        machine_info.update(
            torch=torch.__version__,
            torch_threads=torch.get_num_threads(),
            torch_cpu_capability=torch.backends.cpu.get_cpu_capability(),
            var_kernels_isa=load.native_library().isa,
            malloc=fair_malloc.mode(),
            device=self._device_name(),
        )

    def _device_name(self) -> str:
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        isa = load.native_library().isa or "no library"
        return f"the CPU, {torch.get_num_threads()} threads; var_kernels at {isa}"

    def pytest_benchmark_update_json(self, output_json: dict) -> None:
        output_json["peaks"] = self.peaks.as_dict()
        output_json["plain_allocation"] = self.plain

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        duel, reporter = self.duel_of_session, terminalreporter
        if not duel.rows:
            return
        reporter.section("side by side (results are checked before they are timed)")
        reporter.line(f"torch {torch.__version__} on {self._device_name()}")
        if self.device == "cpu":
            reporter.line(fair_malloc.mode())
        reporter.line("limits of this machine, measured in this session:")
        for line in self.peaks.lines():
            reporter.line(f"  {line}")
        for title, rows in duel.rows.items():
            case = duel.cases[title]
            header, *lines = case_lines(title, case.baseline, case.work, rows, self.peaks, case.missing.items())
            reporter.line("")
            reporter.line(header, bold=True)
            for line in lines:
                reporter.line(line)
            if title in self.plain:
                reporter.line(plain_mode.line(self.plain[title], case.baseline))
        if self.device == "cuda":
            self._report_ranking(reporter)

    def _report_ranking(self, reporter: pytest.TerminalReporter) -> None:
        ranked, unranked = ranking.rank(self.cases, self.duel_of_session.rows)
        reporter.line("")
        for line in ranking.lines(ranked, unranked):
            reporter.line(line)
        why_not = self.no_record if ranked else "nothing was ranked"
        reporter.line(ranking.record(ranked) if why_not is None else f"not recorded: {why_not}")
