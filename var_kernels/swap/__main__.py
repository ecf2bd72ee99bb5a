"""The commands `python -m var_kernels.swap check PATH` and `python -m var_kernels.swap kernels FOLDER`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from .._malloc import fair_environment
from ..native.build import replace_unprintable
from . import hub

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Size(str, Enum):
    """The sizes of the model that is made: a small one, and those of VAR-d16 and Infinity's smallest."""

    small = "small"
    d16 = "d16"
    block512 = "block512"
    block1024 = "block1024"
    layer12 = "layer12"


class Repository(NamedTuple):
    """How a checkout is recognised, and the modules that run its models, by size."""

    name: str
    file: str
    modules: dict[Size, str]


REPOSITORIES = (
    Repository(
        "VAR", "models/basic_var.py",
        {Size.small: "checkout", Size.d16: "checkout", Size.block512: "checkout_block",
         Size.block1024: "checkout_block"},
    ),
    Repository(
        "Infinity", "infinity/models/basic.py",
        {Size.small: "checkout_infinity", Size.layer12: "checkout_infinity"},
    ),
)  # fmt: skip


@app.callback()
def _commands() -> None:
    """Swaps our ops into other repositories."""


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="a clone of FoundationVision/VAR or Infinity")],
    size: Annotated[Size, typer.Option(help="the model to make, with random weights")] = Size.small,
    batch: Annotated[int, typer.Option(min=1, help="images in a training step")] = 2,
    seconds: Annotated[float, typer.Option(min=0, help="time for measuring each row")] = 20.0,
) -> None:
    """Runs a checkout in a process of its own with random weights, before and after the swap, and compares both.

    Differences are relative to the unswapped result; for bf16 autocast, both are compared with fp32. Times are medians
    of alternating runs on all cores. Exits with 1 if tokens differ, or if a result is farther from the right one than
    rounding explains.
    """
    if not path.is_dir():
        raise typer.BadParameter(f"expected the directory of a checkout, got {path}", param_hint="PATH")
    repository = next((known for known in REPOSITORIES if (path / known.file).is_file()), None)
    if repository is None:
        files = " or ".join(f"{known.name} ({known.file})" for known in REPOSITORIES)
        raise typer.BadParameter(f"{path}: expected a checkout of {files}, found neither", param_hint="PATH")
    if size not in repository.modules:
        sizes = ", ".join(known.value for known in repository.modules)
        raise typer.BadParameter(f"expected {sizes} for {repository.name}, got {size.value}", param_hint="--size")
    command = [sys.executable, "-m", f"var_kernels.swap.{repository.modules[size]}", str(path), size.value, str(batch)]
    console = Console()
    with console.status(f"running {path} before and after the swap"):
        answers = [
            subprocess.run([*command, *options], env=env, capture_output=True, text=True)
            for options, env in (
                (["compare", str(seconds)], fair_environment()), (["memory", "before"], os.environ),
                (["memory", "after"], os.environ),
            )
        ]  # fmt: skip
    for answer in answers:
        if answer.returncode != 0:
            print(answer.stderr, file=sys.stderr)
            raise typer.Exit(1)
    result, before, after = (json.loads(answer.stdout.splitlines()[-1]) for answer in answers)
    console.print(result["report"], markup=False, highlight=False)
    table = Table(title=f"{path.name}, {size.value}, random weights, {result['threads']} threads")
    for column in ("", "results", "before", "after", "ratio"):
        table.add_column(column, justify="left" if column in ("", "results") else "right")
    for row in result["rows"]:
        table.add_row(row["name"], row["difference"], *_times(row))
    table.add_row(
        "peak memory of a training step, bf16 autocast", "", *(f"{peak >> 20} MiB" for peak in (before, after)),
        f"{before / after:.2f}",
    )  # fmt: skip
    console.print(table)
    if wrong := [row["name"] for row in result["rows"] if not row["right"]]:
        console.print(f"wrong: {', '.join(wrong)}")
        raise typer.Exit(1)


@app.command()
def kernels(
    folder: Annotated[Path, typer.Argument(help="the folder of the repository, which is made if it is missing")],
) -> None:
    """Builds a kernel repository for the `kernels` package of Hugging Face, with the layers that our ops serve."""
    for path in hub.build_repository(folder):
        print(path)


def _times(row: dict) -> tuple[str, str, str]:
    before, after, ratio = row["times"]
    return f"{before:.3g} s", f"{after:.3g} s", f"{ratio:.2f}"


if __name__ == "__main__":
    replace_unprintable()
    app()
