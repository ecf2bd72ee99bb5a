"""``python -m tools.report``: compiles every GPU kernel for every target and reports on the machine code."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from var_kernels.native.build import replace_unprintable, write_atomically
from var_kernels.triton.problems import PROBLEMS, Problem
from var_kernels.triton.targets import TARGETS

from . import budgets, tables
from .bounds import problem_bound
from .rows import Failure, Row, tools
from .sources import SOURCES, collect


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description="Compile the GPU kernels of named problems for GPUs that need not be present, and print "
        "registers, spills, shared memory, occupancy, tensor-core instructions, widths of accesses and the bounds "
        "that follow from published peaks. Nothing is run: these are static bounds, not measurements.",
    )
    ops = tuple(dict.fromkeys(problem.op for problem in PROBLEMS))
    parser.add_argument("--target", action="append", metavar="NAME", help=f"one of {', '.join(TARGETS)}; repeatable")
    parser.add_argument("--op", action="append", metavar="NAME", help=f"one of {', '.join(ops)}; repeatable")
    parser.add_argument("--backend", action="append", metavar="NAME", help=f"one of {', '.join(SOURCES)}; repeatable")
    parser.add_argument("--problem", metavar="TEXT", help="only problems whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to this file")
    parser.add_argument("--write-tables", type=Path, metavar="FOLDER", help="write a Markdown file for each op")
    parser.add_argument("--check", action="store_true", help="print violations only; exit status 1 if there are any")
    parser.add_argument("--update-budgets", action="store_true", help="record what the kernels use now as their budget")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that compile (default 2)")
    options = parser.parse_args(arguments)
    for name, valid in (("--target", TARGETS), ("--op", ops), ("--backend", SOURCES)):
        chosen = getattr(options, name[2:])
        for value in chosen or ():
            if value not in valid:
                parser.error(f"{name}: expected one of {', '.join(valid)}, got {value!r}")
    if options.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {options.jobs}")
    _select(parser, options, options.op or ops)
    return options


def _select(parser: argparse.ArgumentParser, options: argparse.Namespace, ops: Sequence[str]) -> None:
    """Adds the problems, targets and backends that the options name. `complete`: nothing of these backends is left
    out."""
    options.problems = [
        problem for problem in PROBLEMS
        if problem.op in ops and (options.problem is None or options.problem in problem.name)
    ]  # fmt: skip
    if not options.problems:
        names = "; ".join(problem.name for problem in PROBLEMS if problem.op in ops)
        parser.error(f"--problem: expected a part of one of: {names}, got {options.problem!r}")
    options.targets = [name for name in TARGETS if name in (options.target or TARGETS)]
    options.backends = [name for name in SOURCES if name in (options.backend or SOURCES)]
    theirs = {name for backend in options.backends for problem in options.problems for name in problem.targets
              if SOURCES[backend].unit(problem, name) is not None}  # fmt: skip
    if theirs.isdisjoint(options.targets):
        names = ", ".join(sorted(theirs)) or "none"
        parser.error(f"--target: expected one of those that such a problem is compiled for, {names}")
    options.complete = not (options.target or options.op or options.problem)
    if options.write_tables is not None and not (options.complete and options.backend is None):
        parser.error("--write-tables: expected no --target, --op, --backend or --problem: the tables show everything")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on the error stream, if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a kernel does not compile or `--check` finds a violation, 2 if the report cannot be made, else 0."""
    options = _parse(arguments)
    if reason := SOURCES["triton"].unavailable_reason():
        print(f"{reason}: it brings the tools that read machine code", file=sys.stderr)
        return 2
    try:
        tools()
        missing = {name: reason for name in options.backends if (reason := SOURCES[name].unavailable_reason())}
        if missing and (options.backend or options.write_tables is not None):
            raise RuntimeError(_not_looked_at(missing))
        options.backends = [name for name in options.backends if name not in missing]
        known, releases = budgets.load()
        with _progress() as progress:
            results = collect(options.problems, options.targets, options.backends, options.jobs, progress)
        return _report(options, results, missing, known, releases)
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def _not_looked_at(missing: dict[str, str]) -> str:
    return "\n".join(
        f"the {name} kernels and their budgets were not looked at: {reason}" for name, reason in missing.items()
    )


def _report(
    options: argparse.Namespace,
    results: list[Row | Failure],
    missing: dict[str, str],
    known: dict[str, dict],
    releases: dict[str, str],
) -> int:
    console = Console(highlight=False)
    say = functools.partial(console.print, markup=False, soft_wrap=True)
    if options.json is not None:
        text = json.dumps(_as_json(options, results, missing), indent=1)
        write_atomically(options.json, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    if options.write_tables is not None:
        tables.write(options.write_tables, tables.files(options.problems, options.targets, results))
    complete = options.backends if options.complete else ()
    if options.update_budgets:
        releases = releases | _releases(options.backends)
        known = budgets.update(results, known, complete)
        budgets.save(known, releases)
    if not options.check:
        if options.write_tables is None and not options.update_budgets:
            _print(console, options.problems, options.targets, results)
        failures = [result for result in results if isinstance(result, Failure)]
        for line in [*failures, *filter(None, [_not_looked_at(missing)])]:
            say(str(line))
        return 1 if failures else 0
    violations, others = budgets.check(results, known, complete), list(_other_compilers(options.backends, releases))
    if set(complete) == set(SOURCES) and not others:  # another compiler's code has other tables
        violations += tables.stale(tables.GENERATED, tables.files(options.problems, options.targets, results))
    for line in [*violations, *others, *filter(None, [_not_looked_at(missing)])]:
        say(line)
    kernels = sum(isinstance(result, Row) for result in results)
    say(f"{kernels} kernels for {len(options.targets)} targets: {len(violations) or 'no'} violations")
    return 1 if violations else 0


def _other_compilers(backends: list[str], releases: dict[str, str]) -> Iterator[str]:
    """A sentence for each compiler of another release than that of the budgets, whose code may differ."""
    for compiler, release in _releases(backends).items():
        if releases.get(compiler) not in (None, release):
            yield f"the budgets are those of {compiler} {releases[compiler]}, this is {release}"


def _releases(backends: list[str]) -> dict[str, str]:
    """The release of each backend's compiler."""
    return {SOURCES[name].COMPILER: SOURCES[name].release() for name in backends}


def _print(console: Console, problems: list[Problem], targets: list[str], results: list[Row | Failure]) -> None:
    console.print(tables.NOTE)
    tables.to_console(console, tables.cards(targets))
    for op in dict.fromkeys(problem.op for problem in problems):
        console.print(f"\n[bold]{op}")
        tables.to_console(console, tables.bounds([problem for problem in problems if problem.op == op], targets))
        tables.to_console(console, tables.details([r for r in results if isinstance(r, Row) and r.op == op]))


def _as_json(options: argparse.Namespace, results: list[Row | Failure], missing: dict[str, str]) -> dict:
    described = [
        {
            "op": problem.op,
            "problem": problem.name,
            "bytes": problem.bytes,
            "operations": problem.operations,
            "exponentials": problem.exponentials,
            "static_bounds": {target: asdict(problem_bound(problem, target)) for target in options.targets},
        }
        for problem in options.problems
    ]
    return {
        "note": tables.NOTE,
        "compilers": _releases(options.backends),
        "not looked at": missing,
        "problems": described,
        "kernels": [asdict(result) for result in results if isinstance(result, Row)],
        "failures": [asdict(result) for result in results if isinstance(result, Failure)],
    }


if __name__ == "__main__":
    replace_unprintable()
    sys.exit(main())
