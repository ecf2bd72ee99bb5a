"""What the commands of `python -m var` share: consoles, parsers and checks of options, and errors that are printed as
one line and end with an exit status.

Importing this module does not import torch, so that help and the error for a mistyped option appear at once.
"""

from __future__ import annotations

import errno
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typer.core import TyperCommand, TyperGroup

# Depending on its version, typer has its own copy of click or uses the installed one. This base class exists in both.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
_LONGEST_MESSAGE = 1000
_LARGEST = 2**63 - 1
_FILE_WIDTH = 120  # columns of tables in a file or a pipe, where rich would use only 80

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses; the second is the shell's 128 + SIGINT

# A program can be started without stdout, which is None then.
console = Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else _FILE_WIDTH)
errors = Console(highlight=False, stderr=True)
_outputs = ExitStack()  # the locks of the outputs that this command writes


class Commands(TyperGroup):
    """The group of commands. It turns an expected failure of a command into one line on stderr and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            note("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            message = _explanation(error)
            if message is None or ctx.params.get("traceback"):
                raise
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            note(f"error: {_with_option_name(message, command.params if command else ())}")
            raise typer.Exit(BAD_INPUT) from None
        finally:
            _outputs.close()


class Command(TyperCommand):
    """A command. For every option it refuses nan and infinity, which the ranges of options let pass, and integers that
    torch cannot take."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise typer.BadParameter(f"expected a finite number, got {number}", ctx, parameter)
                if isinstance(number, int) and abs(number) > _LARGEST:
                    raise typer.BadParameter(f"expected a number within ±{_LARGEST}, got {number}", ctx, parameter)
        return rest


def _with_option_name(message: str, parameters: Sequence[Any]) -> str:
    """A message "name: expected …" with the option in place of the name, if the command has an option of that name."""
    name, colon, rest = message.partition(":")
    for parameter in parameters:
        if colon and parameter.name == name and parameter.opts[0].startswith("-"):
            return f"{parameter.opts[0]}:{rest}"
    return message


def _explanation(error: Exception) -> str | None:
    """One line for an error that the user or the machine caused, or None for a fault of the program."""
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context is not None else ""
        return error.format_message() + hint  # type: ignore[attr-defined]
    if isinstance(error, OSError):
        return _os_explanation(error)
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        return "out of memory: try a smaller --batch-size, or --precision bf16"
    if isinstance(error, OverflowError) or (isinstance(error, RuntimeError) and "overflow" in str(error)):
        return f"a number is too large: {' '.join(str(error).split())}"
    # Compared by name, because importing their modules would import torch.
    if isinstance(error, ValueError) or type(error).__name__ in ("TrainingError", "SafetensorError"):
        text = " ".join(str(error).split())
        return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} … (all of it: --traceback)"
    return None


def _os_explanation(error: OSError) -> str | None:
    if error.errno == errno.EPIPE:
        return None  # the reader of our output, such as `head`, has ended: typer ends the program silently
    if error.errno is None:
        return " ".join(str(error).split())
    reason = error.strerror or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _is_out_of_memory(error: Exception) -> bool:
    reasons = ("can't allocate memory", "out of memory", "size calculation overflowed", "array is too big")
    return isinstance(error, RuntimeError | ValueError) and any(reason in str(error) for reason in reasons)


def say(message: str) -> None:
    """Print one line of the result on stdout."""
    console.print(message, markup=False, soft_wrap=True)


def note(message: str) -> None:
    """Print one line that is not part of the result on stderr."""
    errors.print(message, markup=False, soft_wrap=True)


@contextmanager
def progress(description: str, total: int) -> Iterator[Any]:
    """Show a bar on stderr until the work is done, if stderr is a terminal. Yields ``advance(steps=1)``."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps=1: bar.advance(task, steps)


def help_text(command: Any) -> str:
    """The docstring of a command with each paragraph on one line, so that help is wrapped at the terminal's width."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.getdoc(command).split("\n\n"))


def integers(text: str | tuple[int, ...]) -> tuple[int, ...]:
    """The value of an option like ``--patch-nums 1,2,4`` or ``"1 2 4"``."""
    if isinstance(text, tuple):  # the default of an option
        return text
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise typer.BadParameter(f"expected integers such as 1,2,4, got {text!r}") from None


def prepare_output(path: Path, *suffixes: str, folder: bool = False) -> None:
    """Raise ValueError for an output that cannot be written, before the work begins. Missing folders are made.

    `suffixes` are the suffixes of the files that may be written. With `folder`, a path without a suffix, or the path of
    an existing folder, is a folder for several files. The output is locked until the command ends, so that two commands
    do not mix their images.
    """
    is_folder = folder and (path.is_dir() or not path.suffix)
    if not is_folder and (path.suffix.lower() not in suffixes or path.is_dir()):
        expected = " or ".join((*(["a folder"] if folder else []), *(f"a {suffix} file" for suffix in suffixes)))
        raise ValueError(f"--output: expected {expected}, got {path}{' (a folder)' if path.is_dir() else ''}")
    from var_kernels._only_writer import only_writer

    try:
        _outputs.enter_context(only_writer(path, folder=is_folder))
    except OSError as error:
        raise ValueError(f"--output: cannot write {path}: {error.strerror or error}") from error


def check_backend(backend: str) -> str:
    """Return `backend`. Raise ValueError, listing the valid names, if there is none of this name."""
    from var_kernels.backends import BACKENDS

    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"--backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def check_precision(precision: str) -> str:
    """Return `precision`. Raise ValueError, listing the valid names, if there is none of this name."""
    from ..generation.request import PRECISIONS

    if precision not in PRECISIONS:
        raise ValueError(f"--precision: expected {' or '.join(PRECISIONS)}, got {precision!r}")
    return precision


def check_device(device: str) -> str:
    """Return `device`. Raise ValueError if torch does not know it or this machine does not have it."""
    import torch

    try:
        torch.zeros(1, device=device).cpu()  # a tensor of the device "meta" has no values
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--device: expected a device of this machine, such as cpu, got {device!r} ({reason})"
        ) from error
    return device
