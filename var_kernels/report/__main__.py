"""``python -m var_kernels.report``: compiles every Triton kernel for every target and reports what the code says."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..triton.targets import TARGETS
from . import budgets, tables
from .bounds import problem_bound
from .problems import PROBLEMS, Problem
from .sources import Failure, Row, collect, tools


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m var_kernels.report",
        description="Compile the Triton kernels of named problems for GPUs that need not be there, and print "
        "registers, spills, shared memory, occupancy, tensor-core instructions, widths of accesses and the bounds "
        "that follow from published peaks. Nothing is run: these are static bounds, not measurements.",
    )
    ops = tuple(dict.fromkeys(problem.op for problem in PROBLEMS))
    parser.add_argument("--target", action="append", metavar="NAME", help=f"one of {', '.join(TARGETS)}; repeatable")
    parser.add_argument("--op", action="append", metavar="NAME", help=f"one of {', '.join(ops)}; repeatable")
    parser.add_argument("--problem", metavar="TEXT", help="only problems whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="rewrite the tables of this page")
    parser.add_argument("--check", action="store_true", help="print violations only; exit status 1 if there are any")
    parser.add_argument("--update-budgets", action="store_true", help="record what the kernels use now as their budget")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (default 2)")
    options = parser.parse_args(arguments)
    for name, chosen, valid in (("--target", options.target, TARGETS), ("--op", options.op, ops)):
        for value in chosen or ():
            if value not in valid:
                parser.error(f"{name}: expected one of {', '.join(valid)}, got {value!r}")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    options.problems = [
        problem for problem in PROBLEMS
        if problem.op in (options.op or ops) and (options.problem is None or options.problem in problem.name)
    ]  # fmt: skip
    if not options.problems:
        names = "; ".join(problem.name for problem in PROBLEMS if problem.op in (options.op or ops))
        parser.error(f"--problem: expected a part of one of: {names}, got {options.problem!r}")
    options.targets = [name for name in TARGETS if name in (options.target or TARGETS)]
    if not any(name in problem.targets for problem in options.problems for name in options.targets):
        theirs = ", ".join(sorted({name for problem in options.problems for name in problem.targets}))
        parser.error(f"--target: expected one of those that such a problem is compiled for, {theirs}")
    options.complete = not (options.target or options.op or options.problem)
    if options.markdown is not None and not options.complete:
        parser.error("--markdown: expected no --target, --op or --problem, for the page shows all of them")
    return options


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on the error stream, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a kernel does not compile or `--check` finds a violation, 2 if the report cannot be made, else 0."""
    options = _parse(arguments)
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: there are no kernels to report on (pip install triton)", file=sys.stderr)
        return 2
    try:
        tools()
        known, recorded_with = budgets.load()
        with _progress() as progress:
            results = collect(options.problems, options.targets, options.jobs, progress)
        return _report(options, results, known, recorded_with)
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def _report(
    options: argparse.Namespace, results: list[Row | Failure], known: dict[str, dict], recorded_with: str | None
) -> int:
    import triton

    console = Console(highlight=False)
    if options.json is not None:
        options.json.write_text(json.dumps(_as_json(options.problems, options.targets, results), indent=1))
    if options.markdown is not None:
        tables.rewrite(options.markdown, tables.markdown(options.problems, options.targets, results))
    if options.update_budgets:
        recorded_with = triton.__version__
        known = budgets.update(results, known, options.complete)
        budgets.save(known, recorded_with)
    if not options.check:
        if options.markdown is None and not options.update_budgets:
            _print(console, options.problems, options.targets, results)
        failures = [result for result in results if isinstance(result, Failure)]
        for failure in failures:
            where = f"{failure.op}, {failure.problem} on {failure.target}"
            console.print(f"{where}: does not compile: {failure.message}", markup=False, soft_wrap=True)
        return 1 if failures else 0
    violations = budgets.check(results, known, options.complete)
    for violation in violations:
        console.print(violation, markup=False, soft_wrap=True)
    if recorded_with not in (None, triton.__version__):
        console.print(f"the budgets are those of Triton {recorded_with}, this is {triton.__version__}", soft_wrap=True)
    kernels = sum(isinstance(result, Row) for result in results)
    console.print(f"{kernels} kernels for {len(options.targets)} targets: {len(violations) or 'no'} violations")
    return 1 if violations else 0


def _print(console: Console, problems: list[Problem], targets: list[str], results: list[Row | Failure]) -> None:
    console.print(tables.NOTE)
    tables.to_console(console, tables.cards(targets))
    for op in dict.fromkeys(problem.op for problem in problems):
        console.print(f"\n[bold]{op}")
        tables.to_console(console, tables.bounds([problem for problem in problems if problem.op == op], targets))
        tables.to_console(console, tables.details([r for r in results if isinstance(r, Row) and r.op == op]))


def _as_json(problems: list[Problem], targets: list[str], results: list[Row | Failure]) -> dict:
    import triton

    described = [
        {
            "op": problem.op,
            "problem": problem.name,
            "bytes": problem.bytes,
            "operations": problem.operations,
            "exponentials": problem.exponentials,
            "static_bounds": {target: asdict(problem_bound(problem, target)) for target in targets},
        }
        for problem in problems
    ]
    rows = [asdict(result) for result in results if isinstance(result, Row)]
    failures = [asdict(result) for result in results if isinstance(result, Failure)]
    return {
        "note": tables.NOTE, "triton": triton.__version__, "problems": described, "kernels": rows, "failures": failures,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
