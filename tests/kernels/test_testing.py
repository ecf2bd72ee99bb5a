"""The comparison itself, `assert_accurate`: wrong results must fail, and right ones must pass."""

import platform

import pytest
import torch

from var_kernels import testing
from var_kernels.testing import assert_accurate, attention_inputs, modulation, poison, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _softmax_average(dtype):
    """A causal average of values, whose late rows are small: (plain result in `dtype`, exact result)."""
    q, k, v = attention_inputs(1, 2, 200, 16, seed=0, dtype=dtype)

    def average(q, k, v):
        logits = (q @ k.mT).masked_fill(torch.ones(200, 200, dtype=torch.bool).triu(1), -torch.inf)
        return torch.softmax(logits / 4, -1) @ v

    return average(q.float(), k.float(), v.float()).to(dtype), average(q.double(), k.double(), v.double())


@pytest.fixture(params=DTYPES, ids=str)
def case(request):
    return _softmax_average(request.param)


def test_accepts_the_plain_result_and_the_rounded_exact_one(case):
    plain, exact = case
    assert_accurate(plain, plain, exact)
    assert_accurate(exact.to(plain.dtype), plain, exact)


def test_accepts_a_neighbour_in_the_dtype(case):
    plain, exact = case
    neighbour = plain * (1 + torch.finfo(plain.dtype).eps)
    assert_accurate(neighbour, plain, exact)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: torch.zeros_like(t),
        lambda t: t.roll(1, -2),
        lambda t: t * 1.05,
        lambda t: -t,
        lambda t: torch.cat([t[..., :-1, :], torch.zeros_like(t[..., -1:, :])], -2),
    ],
    ids=["zeros", "off by one row", "wrong scale", "wrong sign", "last row forgotten"],
)
def test_refuses_a_wrong_result(case, spoil):
    plain, exact = case
    with pytest.raises(AssertionError, match="out: .* of 6400 elements are off .* worst at"):
        assert_accurate(spoil(plain), plain, exact, name="out")


def test_zero_late_rows_fail_although_the_first_row_is_large():
    # In bf16, the bound of the whole tensor is larger than the late rows, so that only the bound of a row finds them.
    plain, exact = _softmax_average(torch.bfloat16)
    plain[..., 0, :] *= 16
    exact[..., 0, :] *= 16
    spoilt = plain.clone()
    spoilt[..., 150:, :] = 0
    assert exact[..., 150:, :].abs().max() < 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    with pytest.raises(AssertionError, match="off by more"):
        assert_accurate(spoilt, plain, exact)


def test_the_message_names_the_worst_index():
    exact = randn(3, 4, 10, seed=1, dtype=torch.float64)
    spoilt = exact.float()
    spoilt[1, 2, 3] += 1
    with pytest.raises(AssertionError, match=r"y: 1 of 120 elements .* worst at \(1, 2, 3\)"):
        assert_accurate(spoilt, exact.float(), exact, name="y")


def test_rows_that_are_zero_but_for_rounding_get_the_bound_of_the_tensor():
    exact = randn(8, 16, seed=2, dtype=torch.float64)
    exact[0] = 1e-19
    plain = exact.float()
    plain[0] = 3e-8
    noisy = exact.float()
    noisy[0] = -2e-8
    assert_accurate(noisy, plain, exact)
    noisy[0] = 1e-3
    with pytest.raises(AssertionError, match=r"worst at \(0, "):
        assert_accurate(noisy, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shape_and_dtype_are_part_of_the_result(dtype):
    exact = randn(4, 8, seed=3, dtype=torch.float64)
    plain = exact.to(dtype)
    with pytest.raises(AssertionError, match=r"expected shape \(4, 8\), got \(8, 4\)"):
        assert_accurate(plain.mT, plain, exact)
    with pytest.raises(AssertionError, match="expected dtype"):
        assert_accurate(exact, plain, exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_match_in_place_and_kind(value):
    exact = randn(4, 8, seed=4, dtype=torch.float64)
    plain = exact.float()
    spoilt = plain.clone()
    spoilt[2, 5] = value
    with pytest.raises(AssertionError, match=r"first at \(2, 5\)"):
        assert_accurate(spoilt, plain, exact)
    exact[2, 5] = value
    assert_accurate(spoilt, plain, exact)
    with pytest.raises(AssertionError, match=r"first at \(2, 5\)"):
        assert_accurate(plain, plain, exact)
    spoilt[2, 5] = -value if value == value else float("inf")
    with pytest.raises(AssertionError, match=r"first at \(2, 5\)"):
        assert_accurate(spoilt, plain, exact)


def test_a_result_must_overflow_where_the_dtype_does():
    exact = randn(2, 8, seed=5, dtype=torch.float64)
    exact[0, 0] = 1e6
    plain = exact.half()
    assert plain[0, 0] == torch.inf
    assert_accurate(exact.half(), plain, exact)
    with pytest.raises(AssertionError, match="non-finite"):
        assert_accurate(exact.half().clamp(max=65504), plain, exact)


def test_a_plain_result_with_which_zeros_would_pass_is_refused():
    exact = randn(4, 8, seed=6, dtype=torch.float64)
    with pytest.raises(AssertionError, match="zeros would pass"):
        assert_accurate(exact.float(), -exact.float(), exact)
    assert_accurate(exact.float(), -exact.float(), exact, may_vanish=True)


def test_vanishing_and_empty_and_scalar_results():
    zero = torch.zeros(4, 8, dtype=torch.float64)
    noise = randn(4, 8, seed=7, std=1e-8)
    assert_accurate(noise * 0.9, noise, zero)
    assert_accurate(zero.float(), zero.float(), zero)
    with pytest.raises(AssertionError, match="off by more"):
        assert_accurate(noise, zero.float(), zero)
    assert_accurate(torch.empty(0, 8), torch.empty(0, 8), torch.empty(0, 8, dtype=torch.float64))
    assert_accurate(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64))


def test_wrong_arguments_of_the_comparison_are_no_assertion_errors():
    exact = randn(4, 8, seed=8, dtype=torch.float64)
    with pytest.raises(TypeError, match="exact: expected torch.float64"):
        assert_accurate(exact.float(), exact.float(), exact.float())
    with pytest.raises(TypeError, match="actual: expected a floating-point tensor, got torch.int64"):
        assert_accurate(exact.long(), exact.float(), exact)
    with pytest.raises(ValueError, match="same_dtype: expected shape"):
        assert_accurate(exact.float(), exact[0].float(), exact)


def test_max_error():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert testing.max_error(torch.tensor([1.0, 2.5]), exact) == 0.5
    assert testing.max_error(torch.empty(0), torch.empty(0)) == 0


def test_named_shapes_have_the_published_lengths():
    lengths = {name: sum(testing.scale_lens(name)) for name in testing.SCHEDULES}
    assert lengths == {
        "embedded": 130, "256px": 680, "512px": 2240, "1024px": 9451,
        "infinity-256px": 521, "infinity-512px": 2521, "infinity-1024px": 10521,
    }  # fmt: skip
    assert {name: shape.length for name, shape in testing.SHAPES.items()} == {
        "d16": 680, "d20": 680, "d24": 680, "d30": 680, "d36": 2240,
    }  # fmt: skip
    assert all(shape.head_dim == 64 for shape in testing.SHAPES.values())
    with pytest.raises(ValueError, match="patch_nums: expected one of embedded"):
        testing.scale_lens("4096px")


def test_inputs_are_seeded_and_scaled():
    q, k, v = attention_inputs(2, 4, 100, 64, seed=0, kv_heads=2, query_length=30, logit_std=20)
    assert q.shape == (2, 4, 30, 64) and k.shape == v.shape == (2, 2, 100, 64)
    logits = q[:, :2] @ k.mT / 8
    assert 18 < logits.std() < 22
    again = attention_inputs(2, 4, 100, 64, seed=0, kv_heads=2, query_length=30, logit_std=20)
    assert torch.equal(q, again[0]) and not torch.equal(k, v)
    assert torch.equal(randn(5, seed=1, dtype=torch.bfloat16), randn(5, seed=1).bfloat16())


@pytest.mark.parametrize("length", [None, 5])
def test_modulation_is_a_view_that_cannot_be_ignored(length):
    gate, scale, shift = modulation(3, 8, seed=0, length=length)
    assert gate.shape == (3, length or 1, 8) and gate.stride(-1) == 1 and gate.stride(0) == 24 * (length or 1)
    assert gate.mean() < scale.mean() < shift.mean() and gate.abs().min() > 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators may return freed memory as zeros")
@pytest.mark.parametrize("shape", [(20,), (3, 100), (1000, 1000), (4, 680, 1024)], ids=str)
def test_poison_shows_an_unwritten_output(shape):
    like = torch.zeros(shape)
    poison(like)
    assert (torch.empty_like(like) > 3e38).all()
    assert torch.empty_like(like, dtype=torch.float16).isnan().all()


def test_isa_levels_start_with_portable_and_end_with_the_one_in_use():
    from var_kernels.native import load

    levels = testing.isa_levels()
    status = load.native_library()
    assert levels == () if not status.available else (levels[0], levels[-1]) == ("portable", status.isa)
