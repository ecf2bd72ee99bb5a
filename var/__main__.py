"""`python -m var`: generate, reconstruct and train from the command line."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from var_kernels.native.build import replace_unprintable

from .cli import images, training
from .cli.console import Commands, help_text
from .generation.memory import keep_freed_memory

app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def program(
    traceback: Annotated[bool, typer.Option(
        "--traceback", help="Show where an error comes from, instead of one line. Goes before the command.")] = False,
) -> None:
    """Next-scale image generation (VAR) on the kernels of var_kernels.

    A picture is generated coarse to fine: a transformer predicts all tokens of one scale at once, given all smaller
    scales, and a tokenizer (a multi-scale VQ-VAE) turns the tokens into pixels. A small trained model ships with the
    package; `python -m var demo` shows it.

    Exit status: 0 if the command is done, 2 for bad input or an output that cannot be written, 130 if interrupted.
    """


app.callback(help=help_text(program))(program)
images.register(app)
training.register(app)

if __name__ == "__main__":
    replace_unprintable()
    warnings.formatwarning = lambda message, *where, **options: f"warning: {message}\n"
    keep_freed_memory()
    app(prog_name="python -m var")
