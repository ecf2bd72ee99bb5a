"""A small model and a runner of commands, for the tests of the command line."""

import dataclasses

import torch
from typer.testing import CliRunner

import var
from tests.helpers.training import VAR_CONFIG, VQVAE_CONFIG
from var.__main__ import app
from var.data.datasets import FASHION_MNIST_CLASSES

# The commands are tested on the reference ops, so that a fault here is a fault of the command line.
REFERENCE = ("--backend", "reference")


def save_model(folder):
    """Writes an untrained model of ten classes with sampling defaults of its own, and returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae = var.VQVAE(VQVAE_CONFIG)
        transformer = var.VAR(dataclasses.replace(VAR_CONFIG, class_names=FASHION_MNIST_CLASSES))
        transformer.init_weights()
        torch.nn.init.normal_(transformer.head.weight)  # else all tokens are equally likely with any options
    var.save(folder / "vqvae.safetensors", vqvae, {"data": "none"})
    sampling = {"sampling_cfg": "2.5", "sampling_top_k": "7", "sampling_top_p": "0.9"}
    var.save(folder / "var.safetensors", transformer, sampling)
    return folder


def invoke(*arguments):
    """The result of a command: exit code, standard output and standard error."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for threads, which cost much on a busy machine
    try:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])
    finally:
        torch.set_num_threads(threads)


def run(*arguments, status=0):
    """Standard output of a command (standard error if it fails), which must exit with `status`."""
    result = invoke(*arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stderr if status else result.stdout


def refused(*arguments):
    """The one line of the error with which a command refuses its arguments."""
    message = run(*arguments, status=2)
    assert message.startswith("error: ") and message.count("\n") == 1 and message.endswith("\n"), message
    return message


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
