"""Tests the tests of the Triton kernels with planted faults, which are deliberate errors in a copy of the package.

Each fault must make the test named beside it fail. Without a fault, the test passes.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import child_environment, run_pytest
from tests.tiers import ROOT
from tools.gpu_emulation.planted_faults import Mutant, parameters

pytest.importorskip("triton")

ATTENTION = "triton/block_causal_attention.py"
MUTANTS = {
    "a row sees one scale more": Mutant(
        "triton/tiles.py",
        "return [end for length, end in zip(lens, accumulate(lens), strict=True) for _ in range(length)]",
        "ends = [*accumulate(lens)]; ends = [*ends[1:], ends[-1]]; "
        "return [end for length, end in zip(lens, ends, strict=True) for _ in range(length)]",
        "block_causal_attention/test_triton.py::test_schedules",
    ),
    "the last block of keys is not masked": Mutant(
        ATTENTION,
        "    return keys < ends\n",
        "    return keys >= 0\n",
        "block_causal_attention/test_triton.py::test_schedules",
        representative=True,
    ),
    "rows beyond the end of a tile are loaded": Mutant(
        ATTENTION,
        "row_inside = tl.arange(0, ROWS)[:, None] < count",
        "row_inside = tl.arange(0, ROWS)[:, None] < ROWS",
        "block_causal_attention/test_triton.py::test_compiled_code",
    ),
    "sums under an older maximum are not rescaled": Mutant(
        ATTENTION,
        "acc * factor[:, None]",
        "acc",
        "block_causal_attention/test_triton.py::test_large_logits",
    ),
    "the sum of exponentials is not rescaled": Mutant(
        ATTENTION,
        "total * factor + tl.sum(p, 1)",
        "total + tl.sum(p, 1)",
        "block_causal_attention/test_triton.py::test_large_logits",
    ),
    "v is read with the strides of k": Mutant(
        ATTENTION,
        "v_base = _head(v, batch, head // group, v_batch, v_head, STRIDE_UNIT)",
        "v_base = _head(v, batch, head // group, k_batch, k_head, STRIDE_UNIT)",
        "block_causal_attention/test_triton.py::test_strided_inputs",
        times=2,
    ),
    "the gradient of lse is ignored": Mutant(
        ATTENTION,
        "if HAS_DLSE:",
        "if HAS_DLSE and False:",
        "block_causal_attention/test_triton.py::test_log_sum_exp_and_its_gradient",
    ),
    "shift is dropped": Mutant(
        "triton/adaln_layer_norm.py",
        "factors[i] + shifts[i],)",
        "factors[i] + 0 * shifts[i],)",
        "adaln_layer_norm/test_triton.py::test_accurate_over_shapes",
        representative=True,
    ),
    "x is read with the strides of the branch": Mutant(
        "triton/adaln_layer_norm.py",
        "rows_at(x, sample, token, x_b, x_l)",
        "rows_at(x, sample, token, branch_b, x_l)",
        "adaln_layer_norm/test_triton.py::test_accurate_over_shapes",
        times=2,
    ),
    "padded channels count in the variance": Mutant(
        "triton/adaln_layer_norm.py",
        "            if i == C // CHUNK and C % CHUNK != TAIL:\n",
        "            if i < 0:\n",
        "adaln_layer_norm/test_triton.py::test_accurate_over_shapes",
    ),
    "a later tile of equal score wins": Mutant(
        "triton/nearest_code.py",
        "better = top > best",
        "better = top >= best",
        "nearest_code/test_triton.py::test_first_of_equal_codes",
        representative=True,
    ),
    "codes beyond the codebook take part": Mutant(
        "triton/nearest_code.py",
        'mask=v < end, other=float("-inf")',
        "mask=v < end, other=0.0",
        "nearest_code/test_triton.py::test_small_tiles",
    ),
    "the bias of phi is dropped": Mutant(
        "triton/multi_scale_quantize.py",
        "(products + tl.load(bias + o, mask=o < channels, other=0.0)[None, :])",
        "products",
        "multi_scale_quantize/test_triton.py::test_forward_and_backward",
        representative=True,
    ),
    "bicubic taps are not clamped to the map in the backward": Mutant(
        "triton/multi_scale_quantize_backward.py",
        "tl.minimum(tl.maximum(below - 1 + tap, 0), size - 1)",
        "tl.maximum(below - 1 + tap, 0)",
        "multi_scale_quantize/test_triton.py::test_forward_and_backward",
        representative=True,
    ),
    "keys go one row too far into the cache": Mutant(
        "triton/qk_norm_cache.py",
        "place = start + token\n",
        "place = start + 1 + token\n",
        "qk_norm_cache/test_triton.py::test_interpreted",
        representative=True,
    ),
    "columns beyond the head dimension are written": Mutant(
        "triton/qk_norm_cache.py",
        "mask = present & (column < D)",
        "mask = present & (column < WIDTH)",
        "qk_norm_cache/test_triton.py::test_interpreted",
    ),
    "top-p drops the last of equal tokens": Mutant(
        "triton/sample_tokens.py",
        "tied & (index < low), _LOWEST",
        "tied & (index >= tokens - low), _LOWEST",
        "sample_tokens/test_triton.py::test_equal_logits_on_the_border",
        representative=True,
    ),
    "the second half of the key is not used": Mutant(
        "triton/sample_tokens.py",
        "key1 = (seed >> 32).to(tl.uint32)",
        "key1 = (seed >> 32).to(tl.uint32) * 0",
        "sample_tokens/test_triton.py::test_seeds_stand_for_the_documented_noise",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the package and its tests, without the native library."""
    root = tmp_path_factory.mktemp("mutants")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for part in ("var_kernels", "tools", "tests", "var", "csrc"):
        shutil.copytree(ROOT / part, root / part, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def run(root: Path, *tests: str) -> subprocess.CompletedProcess:
    """Runs the tests on the package in `root` until the first failure."""
    environment = child_environment(PYTHONPATH=str(root), VAR_KERNELS_BUILD="none", PYTHONDONTWRITEBYTECODE="1")
    return run_pytest(root, [str(root / "tests/kernels" / test) for test in tests], environment)


@pytest.mark.parametrize("name", parameters(MUTANTS, others=pytest.mark.evidence))
def test_mutant_is_caught(copy, name):
    mutant = MUTANTS[name]
    with mutant.planted(copy / "var_kernels"):
        answer = run(copy, mutant.check)
    # There is one failure, in an assertion of this test, and not an error of compilation or of the copy.
    assert answer.returncode == 1, answer.stdout
    assert re.search(r"^1 failed", answer.stdout.splitlines()[-1]), answer.stdout
    assert re.search(r"^E +(AssertionError|assert |.*PtxError)", answer.stdout, re.M), answer.stdout


@pytest.mark.evidence
def test_without_a_fault_the_copy_passes(copy):
    """The tests of two kernels pass on the copy. All tests pass on the package itself, as every run of them shows."""
    kernels = ("adaln_layer_norm/", "qk_norm_cache/")
    answer = run(copy, *sorted({mutant.check for mutant in MUTANTS.values() if mutant.check.startswith(kernels)}))
    assert answer.returncode == 0, answer.stdout
