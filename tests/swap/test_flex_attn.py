"""Tests swapping Infinity's FlexAttn: schedules, causal masks, padding, and masks that are left to it."""

import pytest
import torch

from tests.helpers.foreign_infinity import FlexAttn
from var_kernels import swap

SCHEDULE = [(1, 1, 1), (1, 2, 2), (1, 3, 4), (1, 6, 5)]


def flex_inputs(queries, keys):
    torch.manual_seed(2)
    return [torch.randn(2, 2, length, 8, requires_grad=True) for length in (queries, keys, keys)]


@pytest.mark.parametrize(("mask", "length", "queries", "keys", "auto_padding"), [
    ("var", 47, 47, 47, False), ("var", 64, 64, 64, False), ("causal", 47, 47, 47, False),
    ("var", 128, 47, 47, True), ("var", 128, 17, 17, True), ("var_infer_mask_with_kv_cache", 128, 30, 47, True),
    ("var_infer_mask_with_kv_cache", 128, 30, 60, True),
], ids=str)  # fmt: skip
def test_flex_attention(mask, length, queries, keys, auto_padding):
    attention = FlexAttn(SCHEDULE, mask, length, auto_padding)
    q, k, v = flex_inputs(queries, keys)
    expected = attention(q, k, v, scale=0.7)
    with swap.applied(attention) as report:
        assert [entry.target for entry in report.swapped] == ["FlexAttn of Infinity"]
        found = attention(q, k, v, scale=0.7)
        assert not report.left_to_the_original
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mask", "queries", "keys"), [
    ("var", 20, 20), ("var", 12, 17), ("var_infer_mask_with_kv_cache", 8, 20),
], ids=str)  # fmt: skip
def test_padded_keys_that_queries_see_are_left_to_flex_attention(mask, queries, keys):
    attention = FlexAttn(SCHEDULE, mask, 128, auto_padding=True)
    q, k, v = flex_inputs(queries, keys)
    expected = attention(q, k, v)
    with swap.applied(attention) as report:
        assert torch.equal(attention(q, k, v), expected)
        assert f"{queries} queries and {keys} keys beside" in str(report)


def test_flex_attention_with_another_mask_is_skipped():
    attention = FlexAttn(SCHEDULE, "var", 47)
    attention.mask_mod = lambda b, h, q_idx, kv_idx: q_idx == kv_idx
    with pytest.warns(UserWarning, match="its mask is <lambda>"):
        swap.apply(attention)

    def var_mask_mod(b, h, q_idx, kv_idx):
        return q_idx == kv_idx

    attention.mask_mod = var_mask_mod
    with pytest.warns(UserWarning, match="its mask is not block-causal"):
        swap.apply(attention)
