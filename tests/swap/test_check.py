"""Tests `python -m var_kernels.swap check` on a checkout whose models are the stand-ins of the tests."""

import subprocess
import sys
import types

import pytest

from tests.helpers import foreign_var
from tests.helpers.processes import child_environment
from tests.tiers import ROOT
from var_kernels.swap import checkout_block


@pytest.fixture
def checkout(tmp_path):
    """A directory with the layout of VAR's repository."""
    models = tmp_path / "VAR" / "models"
    models.mkdir(parents=True)
    (models / "basic_var.py").touch()
    (models / "__init__.py").write_text("from tests.helpers.foreign_var import build_vae_var\n")
    return models.parent


@pytest.fixture
def infinity(tmp_path):
    """A directory with the layout of Infinity's repository."""
    models, utils = (tmp_path / "Infinity" / "infinity" / name for name in ("models", "utils"))
    for folder in (models, utils):
        folder.mkdir(parents=True)
    (models / "basic.py").touch()
    (models / "infinity.py").write_text(
        "import tests.helpers.foreign_infinity as foreign\n"
        "from infinity.utils.dynamic_resolution import dynamic_resolution_h_w\n"
        "class Infinity(foreign.Infinity):\n"
        "    def __init__(self, **options):\n"
        "        super().__init__(schedules=[dynamic_resolution_h_w[1.0]['0.06M']['scales']], **options)\n"
    )
    (utils / "dynamic_resolution.py").write_text(
        "dynamic_resolution_h_w = {1.0: {'0.06M': {'scales': [(1, 1, 1), (1, 2, 2), (1, 4, 4)]}}}\n"
    )
    return tmp_path / "Infinity"


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


def test_a_checkout_of_infinity_is_compared_before_and_after(infinity):
    answer = check(infinity)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for expected in (
        "swapped: attention of Infinity", "swapped: AdaLN block of Infinity", "672 of 672 bits equal",
        "training step, bf16 autocast", "customized_flash_attn, fp32", "peak memory", "ratio",
    ):  # fmt: skip
        assert expected in answer.stdout


def test_a_wrong_result_of_infinity_is_reported(infinity):
    (infinity / "infinity" / "models" / "__init__.py").write_text(
        "from var_kernels.swap import infinity\n"
        "kept = infinity.gated_residual_adaln\n"
        "infinity.gated_residual_adaln = lambda x, branch, *rest, **options: kept(x, 1.01 * branch, *rest, **options)\n"
    )
    answer = check(infinity)
    assert answer.returncode == 1
    assert "wrong: training step, fp32" in answer.stdout, answer.stdout + answer.stderr


def test_sizes_of_another_repository_are_refused(checkout, infinity):
    for path, size, expected in (
        (checkout, "layer12", "small, d16, block512, block1024"), (infinity, "d16", "small, layer12"),
    ):  # fmt: skip
        answer = check(path, "--size", size)
        assert answer.returncode == 2
        assert f"expected {expected}" in answer.stderr and "--size" in answer.stderr


def test_what_is_no_checkout_is_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        answer = check(path)
        assert answer.returncode == 2
        assert "expected" in answer.stderr and "PATH" in answer.stderr


def test_one_block_is_compared(monkeypatch):
    def block(block_idx, last_drop_p, embed_dim, cond_dim, shared_aln, norm_layer, num_heads, attn_l2_norm):
        attention = {"attn_drop": 0.0, "attn_l2_norm": attn_l2_norm, "using_xform": False}
        return foreign_var.AdaLNSelfAttn(embed_dim, num_heads, shared_aln, 0.0, **attention)

    module = types.ModuleType("models.basic_var")
    module.AdaLNSelfAttn = block
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.basic_var", module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(checkout_block.SIZES, "block512", ((1, 2, 3), 128))
    inputs = checkout_block.make("", "block512")
    result = checkout_block.compare(inputs, batch=1, seconds=0)
    [row] = result["rows"]
    assert row["right"] and "L 14, width 128" in row["name"] and "swapped: AdaLN block of VAR" in result["report"]
    assert checkout_block.peak_memory(inputs, batch=1, swapped=True) > 0
