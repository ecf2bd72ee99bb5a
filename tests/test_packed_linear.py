"""PackedLinear against fp64 and F.linear, packed and not; and the contract of the call."""

import pytest
import torch
import torch.nn.functional as F

from var_kernels import packed_linear
from var_kernels.packed_linear import PackedLinear, packing_unavailable_reason
from var_kernels.testing import assert_accurate, randn

DTYPES = (torch.float32, torch.bfloat16)


def expected(x, weight, bias, gelu):
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, gelu, pack):
    for rows, inner, outer in ((1, 1, 1), (2, 64, 192), (7, 33, 65), (130, 96, 40)):
        x, weight = randn(rows, inner, seed=1, dtype=dtype), randn(outer, inner, seed=2, dtype=dtype)
        bias = randn(outer, seed=3)
        layer = PackedLinear(weight, bias, gelu=gelu, pack=pack)
        exact = expected(x.double(), weight.double(), bias.to(dtype).double(), gelu)
        assert_accurate(layer(x), expected(x, weight, bias.to(dtype), gelu), exact, name="y")
        leading = layer(x.view(1, rows, 1, inner))
        assert torch.equal(leading.view(rows, outer), layer(x)) and leading.shape == (1, rows, 1, outer)
        assert_accurate(
            PackedLinear(weight, pack=pack)(x), F.linear(x, weight), F.linear(x.double(), weight.double()), name="y"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_where_onednn_can_and_says_what_it_holds(dtype):
    weight = randn(20, 10, seed=1, dtype=dtype)
    reason = packing_unavailable_reason(dtype)
    layer = PackedLinear(weight)
    assert layer.packed == (reason is None)
    assert layer.nbytes == (weight.nbytes if layer.packed else 0)
    assert PackedLinear(weight, pack=False).nbytes == 0


def test_falls_back_by_capability(monkeypatch):
    monkeypatch.setattr(packed_linear, "_no_onednn", lambda: "no oneDNN")
    weight, x = randn(20, 10, seed=1), randn(3, 10, seed=2)
    layer = PackedLinear(weight, gelu=True)
    assert not layer.packed and packing_unavailable_reason() == "no oneDNN"
    assert torch.equal(layer(x), F.gelu(F.linear(x, weight), approximate="tanh"))
    for dtype, device in ((torch.float16, "cpu"), (torch.float64, "cpu"), (torch.float32, "cuda")):
        assert packing_unavailable_reason(dtype, device)


def test_a_packed_layer_is_a_snapshot():
    weight, x = randn(20, 10, seed=1), randn(3, 10, seed=2)
    layer = PackedLinear(weight)
    before = layer(x)
    weight.zero_()
    assert not layer.packed or torch.equal(layer(x), before)


def test_every_dtype_that_is_not_packed():
    for dtype in (torch.float16, torch.float64):
        x, weight = randn(3, 10, seed=2).to(dtype), randn(20, 10, seed=1).to(dtype)
        assert torch.equal(PackedLinear(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.zeros(4)}, ValueError, "weight: expected 2 dimensions"),
        ({"weight": torch.zeros(4, 3).int()}, TypeError, "weight: expected a floating-point"),
        ({"bias": torch.zeros(3)}, ValueError, "bias: expected shape"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias: expected device"),
    ],
)
def test_bad_weights(change, error, match):
    with pytest.raises(error, match=match):
        PackedLinear(**{"weight": torch.zeros(4, 3), "bias": torch.zeros(4), **change})


@pytest.mark.parametrize("x", [torch.zeros(2, 4), torch.zeros(2, 3).bfloat16()])
def test_bad_input(x):
    with pytest.raises(ValueError, match="x: expected"):
        PackedLinear(torch.zeros(4, 3))(x)
