"""Tests `python -m var_kernels.swap check` on a checkout whose models are the stand-ins of the tests."""

import subprocess
import sys

import pytest

from tests.helpers.processes import child_environment
from tests.tiers import ROOT


@pytest.fixture
def checkout(tmp_path):
    """A directory with the layout of VAR's repository."""
    models = tmp_path / "VAR" / "models"
    models.mkdir(parents=True)
    (models / "basic_var.py").touch()
    (models / "__init__.py").write_text("from tests.helpers.foreign_var import build_vae_var\n")
    return models.parent


def check(path, *options):
    command = [sys.executable, "-m", "var_kernels.swap", "check", str(path), "--seconds", "0", *options]
    environment = child_environment(PYTHONPATH=str(ROOT), COLUMNS="200")
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_checkout_is_compared_before_and_after(checkout):
    answer = check(checkout)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for expected in (
        "swapped: attention of VAR", "1360 of 1360 equal", "680 of 680 tokens equal", "training step, bf16 autocast",
        "peak memory", "ratio",
    ):  # fmt: skip
        assert expected in answer.stdout


def test_a_wrong_result_is_reported(checkout):
    # Another quantizer while our code serves it: `applied` is the only thing that tells it apart.
    (checkout / "models" / "__init__.py").write_text(
        "from tests.helpers.foreign_var import build_vae_var\n"
        "from var_kernels.swap import var\n"
        "kept = var.next_scale_input\n"
        "var.next_scale_input = lambda f, codes, **options: kept(f, 1.01 * codes, **options)\n"
    )
    answer = check(checkout)
    assert answer.returncode == 1
    assert "wrong: inputs of training, generation" in answer.stdout, answer.stdout + answer.stderr


def test_what_is_no_checkout_is_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        answer = check(path)
        assert answer.returncode == 2
        assert "expected" in answer.stderr and "PATH" in answer.stderr
