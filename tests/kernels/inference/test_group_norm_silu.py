"""group_norm_silu: accuracy against fp64, statistics, layouts, `out`, arguments."""

import pytest
import torch
import torch.nn.functional as F

from var_kernels import group_norm_silu
from var_kernels.testing import assert_accurate, randn, stated_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Batch, channels, groups, height, width. Pixels are on both sides of a chunk of 64; channels leave every vector's tail.
SHAPES = [(1, 2, 2, 1, 2), (2, 6, 3, 1, 7), (1, 32, 32, 7, 9), (2, 40, 4, 8, 8), (1, 96, 32, 5, 13), (3, 33, 3, 11, 12),
          (2, 160, 32, 16, 16)]  # fmt: skip


def plain(x, weight, bias, groups, silu):
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), 1e-6)
    return F.silu(y) if silu else y


def problem(batch, channels, height, width, dtype=torch.float32):
    x = randn(batch, channels, height, width, seed=height, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x, randn(channels, seed=2), randn(channels, seed=3)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, silu):
    batch, channels, groups, height, width = shape
    x, weight, bias = problem(batch, channels, height, width, dtype)
    y = group_norm_silu(x, weight, bias, groups, silu=silu)
    exact = plain(x.double(), weight, bias, groups, silu)
    with stated_order():
        same = plain(x.float(), weight, bias, groups, silu).to(dtype)
    assert_accurate(y, same, exact, name="y")
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    for out in (x.clone(memory_format=torch.preserve_format), torch.full_like(x, torch.nan)):
        source = x if out.isnan().any() else out
        assert group_norm_silu(source, weight, bias, groups, silu=silu, out=out) is out
        assert torch.equal(out, y)


def test_a_mean_far_from_zero_costs_no_digits():
    """E[x²] − E[x]² in fp32, as PyTorch computes it for channels-last images, has an error of a tenth here."""
    x, weight, bias = problem(1, 64, 24, 24)
    x += 1000
    y = group_norm_silu(x, weight, bias, 32, silu=False)
    exact = plain(x.double(), weight, bias, 32, False)
    # x is rounded to fp32 before. What is left is the rounding of x·factor + addend, two terms of about 1000.
    assert (y - exact).abs().max() < 1000 * 2.0**-22 * exact.abs().max()


def test_large_outputs_stored_past_the_caches_are_the_same():
    x, weight, bias = problem(1, 32, 500, 500)  # 32 MB
    y = group_norm_silu(x, weight, bias, 32)
    with stated_order():
        same = plain(x, weight, bias, 32, True)
    assert_accurate(y, same, plain(x.double(), weight, bias, 32, True), name="y")


def test_layouts_threads_and_runs_agree(restore_threads):
    x, weight, bias = problem(2, 48, 20, 20)
    want = group_norm_silu(x, weight, bias, 4)
    assert torch.equal(group_norm_silu(x.contiguous(), weight, bias, 4), want)
    wide = torch.zeros(2, 48, 20, 25)
    wide[..., :20] = x
    assert torch.equal(group_norm_silu(wide[..., :20], weight, bias, 4), want)
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        assert torch.equal(group_norm_silu(x, weight, bias, 4), want)


def test_nan_stays_in_its_group_and_sample():
    x, weight, bias = problem(2, 8, 5, 5)
    x[1, 5, 2, 2] = torch.nan
    y = group_norm_silu(x, weight, bias, 4)
    assert y[1, 4:6].isnan().all() and not y[0].isnan().any()
    assert not y[1, :4].isnan().any() and not y[1, 6:].isnan().any()


def test_nothing_to_do_and_float64():
    _, weight, bias = problem(1, 8, 1, 1)
    assert group_norm_silu(torch.zeros(0, 8, 3, 3), weight, bias, 4).shape == (0, 8, 3, 3)
    x = randn(1, 8, 3, 3, seed=1).double()
    torch.testing.assert_close(group_norm_silu(x, weight, bias, 4), plain(x, weight, bias, 4, True))


def test_a_named_backend_is_that_backend_or_an_error():
    x, weight, bias = problem(2, 8, 5, 6)
    want = plain(x, weight, bias, 4, True)
    y = group_norm_silu(x, weight, bias, 4, backend="reference")
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, want)
    with pytest.raises(ValueError, match="'cpu' cannot serve group_norm_silu .* does not take torch.float64"):
        group_norm_silu(x.double(), weight, bias, 4, backend="cpu")
    with pytest.raises(ValueError, match="'cuda' cannot serve group_norm_silu on cpu"):
        group_norm_silu(x, weight, bias, 4, backend="cuda")


def test_opcheck():
    from var_kernels.native import load

    if not load.native_library().available:
        pytest.skip("no native library")
    x, weight, bias = randn(2, 70, 8, seed=1), randn(8, seed=2), randn(8, seed=3)
    raw = torch.ops.var_kernels._group_norm_silu
    torch.library.opcheck(raw, (x, weight, bias, 4, 1e-6, True, torch.zeros_like(x)))
    for wrong in (torch.zeros(2, 70, 9), torch.zeros(2, 70, 8).half(), torch.zeros(2, 8, 70).transpose(1, 2)):
        with pytest.raises(RuntimeError, match="y: expected a dense tensor"):
            raw(x, weight, bias, 4, 1e-6, True, wrong)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(2, 8, 3)}, ValueError, "x: expected 4 dimensions"),
        ({"x": torch.zeros(2, 8, 3, 3).int()}, TypeError, "x: expected float32"),
        ({"groups": 3}, ValueError, "groups: expected a divisor of the 8 channels, got 3"),
        ({"groups": 0}, ValueError, "groups"),
        ({"weight": torch.zeros(7)}, ValueError, "weight: expected shape"),
        ({"bias": torch.zeros(8).half()}, TypeError, "bias: expected torch.float32"),
        ({"weight": torch.zeros(8, requires_grad=True)}, RuntimeError, "no gradient"),
        ({"out": torch.zeros(2, 8, 3, 3)}, ValueError, "out: expected a dense tensor with its channels last"),
        ({"out": torch.zeros(2, 8, 3, 4)}, ValueError, r"out: expected shape \(2, 8, 3, 3\), got \(2, 8, 3, 4\)"),
        ({"out": torch.zeros(2, 8, 3, 3).half()}, TypeError, "out: expected torch.float32"),
        ({"out": torch.zeros(2, 8, 3, 3).to(memory_format=torch.channels_last).requires_grad_()}, RuntimeError,
         "no gradient"),
        ({"out": 1}, TypeError, "out: expected a torch.Tensor"),
    ],
)  # fmt: skip
def test_bad_input(change, error, match):
    arguments = {"x": torch.zeros(2, 8, 3, 3), "weight": torch.ones(8), "bias": torch.zeros(8), "groups": 4, **change}
    with pytest.raises(error, match=match):
        group_norm_silu(**arguments)
