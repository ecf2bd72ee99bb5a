"""The report as tables, for a terminal and for Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from var_kernels.native.build import write_atomically
from var_kernels.triton.problems import Problem
from var_kernels.triton.targets import TARGETS

from .bounds import problem_bound
from .budgets import ACCESSES
from .cards import CARDS
from .rows import Failure, Row

GENERATED = Path(__file__).resolve().parents[2] / "docs" / "generated"
WRITTEN = "<!-- Written by `python -m tools.report --write-tables`. -->"
NOTE = "Static bounds and compiler output, not measurements: nothing here was run on a GPU."


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def cards(targets: Sequence[str]) -> Table:
    rows = []
    for name in targets:
        card = CARDS[name]
        peaks = (f"{card.bandwidth / 1e9:.0f}", f"{card.peak_16bit / 1e12:.4g}", f"{card.peak_fp32 / 1e12:.4g}")
        rows.append((name, card.name, *peaks, f"{TARGETS[name].shared_memory >> 10}", card.source))
    header = ("target", "card", "GB/s", "16-bit TFLOP/s", "fp32 TFLOP/s", "KiB per block", "source of the peaks")
    return Table("Cards that bounds are computed for", header, rows)


def bounds(problems: Sequence[Problem], targets: Sequence[str]) -> Table:
    rows = []
    for problem in problems:
        size, operations = problem.bytes, problem.operations
        cells = []
        for target in targets:
            bound = problem_bound(problem, target)
            cells.append(f"{_short(bound.seconds * 1e6)} {bound.limit[0]}")
        figures = (size / 1e6, operations / 1e9, operations / size)
        rows.append((problem.name, *map(_short, figures), *cells))
    header = ("problem", "MB", "GFLOP", "FLOP/byte", *targets)
    return Table("Least time in µs by memory (m), arithmetic (a) or exponentials (e)", header, rows)


def _short(value: float) -> str:
    """Three digits, without an exponent for large numbers."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def resources(rows: Sequence[Row], targets: Sequence[str]) -> Table:
    title = "Registers (r), shared memory in KiB (K), share of resident warps, tensor-core instructions, spills (s)"
    return _matrix(title, rows, targets, _resources)


def _resources(row: Row) -> str:
    parts = [f"{row.registers}r", f"{math.ceil(row.shared_memory / 1024)}K", f"{row.occupancy.share:.0%}", *row.tensor]
    return " ".join(parts + [f"{row.spills}s"] * bool(row.spills))


def accesses(rows: Sequence[Row], targets: Sequence[str]) -> Table:
    title = "Global accesses of 128 bits or more, of all: loads (l), asynchronous copies (c), stores (s)"
    return _matrix(title, rows, targets, _accesses)


def _accesses(row: Row) -> str:
    cells = [f"{name[-6 if name == 'async copies' else 0]}{row.counts[name + ' wide']}/{row.counts[name]}"
             for name in ACCESSES if row.counts.get(name)]  # fmt: skip
    return " ".join(cells + [f"{n} bulk" for n in [row.counts.get("bulk copies")] if n]) or "–"


def loops(rows: Sequence[Row], targets: Sequence[str]) -> Table:
    title = "Main loop: instructions, the pipe that bounds it, and how busy the tensor cores can be at best"
    return _matrix(title, [row for row in rows if row.loop is not None], targets, _loop)


def _loop(row: Row) -> str:
    loop = row.loop
    ceiling = "" if loop.tensor_ceiling is None else f", tensor {loop.tensor_ceiling:.0%}"
    return f"{loop.counts['instructions']}, {loop.limit}{ceiling}"


def _matrix(title: str, rows: Sequence[Row], targets: Sequence[str], cell: Callable[[Row], str]) -> Table:
    """A table with a line per problem, backend and kernel, and a column per target. Specialisations of a kernel in one
    problem are numbered."""
    lines: dict[tuple[str, str, str, int], dict[str, str]] = {}
    for row in rows:
        number = 1
        while row.target in lines.get((row.problem, row.backend, row.kernel, number), {}):
            number += 1
        lines.setdefault((row.problem, row.backend, row.kernel, number), {})[row.target] = cell(row)
    body = []
    for (problem, backend, kernel, number), cells in lines.items():
        name = _function(kernel) + (f" ({number})" if number > 1 else "")
        body.append((problem, backend, name, *(cells.get(target, "–") for target in targets)))
    return Table(title, ("problem", "backend", "kernel", *targets), body)


def _function(kernel: str) -> str:
    return kernel.partition(".")[2]


def details(rows: Sequence[Row]) -> Table:
    """One line per kernel and target. Registers of AMD GPUs are vector (v) and scalar (s) registers."""
    header = (
        "problem", "backend", "kernel", "target", "programs", "waves", "regs", "spills", "KiB", "blocks", "occupancy",
        "tensor", "128-bit", "shfl", "exp", "bar", "instr", "main loop",
    )  # fmt: skip
    body = []
    for row in rows:
        n = row.counts
        programs = f"{row.programs}" + (f" x{row.launches}" if row.launches > 1 else "")
        waves = row.programs / (row.occupancy.blocks * TARGETS[row.target].multiprocessors)
        registers = f"{row.registers}v {row.scalars}s" if row.scalars else f"{row.registers}"
        tensor = ", ".join(f"{kind} {count}" for kind, count in row.tensor.items()) or "–"
        body.append((
            row.problem, row.backend, _function(row.kernel), row.target, programs, f"{waves:.2f}",
            registers, str(row.spills), f"{row.shared_memory / 1024:.4g}", str(row.occupancy.blocks),
            f"{row.occupancy.share:.0%} ({row.occupancy.limit})", tensor, _accesses(row),
            *(str(n.get(name, 0)) for name in ("shuffles", "exp", "barriers", "instructions")),
            "–" if row.loop is None else _loop(row),
        ))  # fmt: skip
    return Table("Kernels", header, body)


# ---- Renderers


def to_console(console: Console, table: Table) -> None:
    rendered = RichTable(
        title="\n" + table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    for column in table.header:
        rendered.add_column(column, overflow="fold")
    for row in table.rows:
        rendered.add_row(*map(Text, row))
    console.print(rendered)


def to_markdown(table: Table) -> str:
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    body = "\n".join("| " + " | ".join(re.sub(r"[|<]", r"\\\g<0>", cell) for cell in line) + " |" for line in lines)
    return f"{table.title}:\n\n{body}\n"


def of_op(
    op: str, problems: Sequence[Problem], targets: Sequence[str], results: Iterable[Row | Failure]
) -> list[Table]:
    """The tables of an op. A table without rows is left out."""
    mine = [row for row in results if isinstance(row, Row) and row.op == op]
    tables = [bounds([problem for problem in problems if problem.op == op], targets)]
    tables += [make(mine, targets) for make in (resources, accesses, loops)]
    return [table for table in tables if table.rows]


def files(problems: Sequence[Problem], targets: Sequence[str], results: Sequence[Row | Failure]) -> dict[str, str]:
    """The Markdown files of the report by name: `cards.md`, and `<op>.md` with all tables of an op."""
    found = {"cards": [cards(targets)]}
    found |= {op: of_op(op, problems, targets, results) for op in dict.fromkeys(problem.op for problem in problems)}
    return {f"{name}.md": _file(name, tables) for name, tables in found.items()}


def _file(title: str, tables: Sequence[Table]) -> str:
    return "\n".join([f"{WRITTEN}\n\n# {title}\n\n*{NOTE}*\n", *map(to_markdown, tables)])


def stale(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """A sentence for each file of `folder` that `write` would write, change or remove."""
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    return [
        f"{folder.name}/{name}: expected what `python -m tools.report --write-tables docs/{folder.name}` writes"
        for name in sorted(there.keys() | texts.keys()) if there.get(name) != texts.get(name)
    ]  # fmt: skip


def write(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes these files to the folder, and removes the other files there that an earlier report wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.md"):
        if path.name not in texts and path.read_text(encoding="utf-8").startswith(WRITTEN):
            path.unlink()
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: Path(path).write_text(text, encoding="utf-8"))
