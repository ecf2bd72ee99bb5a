"""Tests the gated sum at the end of a block: values, gradients, dtypes and shapes are those of the formula."""

import pytest
import torch

from tests.helpers.rounding import assert_as_near
from var_kernels.swap import gated_sum as module
from var_kernels.swap.gated_sum import gated_sum

SHAPES = {"per sample": (3, 1, 24), "shared": (1, 1, 24), "per token": (3, 7, 24), "no batch": (24,)}


def formula(x, branch, gate):
    return x + gate * branch


def tensors(gate_shape=(3, 1, 24), dtypes=(torch.float32,) * 3):
    torch.manual_seed(0)
    shapes = ((3, 7, 24), (3, 7, 24), gate_shape)
    return [torch.randn(shape).to(dtype).requires_grad_(True) for shape, dtype in zip(shapes, dtypes, strict=True)]


def step(function, inputs):
    out = function(*inputs)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)
    return out.detach(), dict(enumerate(torch.autograd.grad(out, inputs, weights)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,) * 3,
        (torch.bfloat16,) * 3,
        (torch.float16,) * 3,
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_values_and_gradients(shape, dtypes):
    inputs = tensors(SHAPES[shape], dtypes)
    exact = step(formula, [tensor.detach().double().requires_grad_(True) for tensor in inputs])
    plain, found = step(formula, inputs), step(gated_sum, inputs)
    assert found[0].dtype == plain[0].dtype
    assert [grad.dtype for grad in found[1].values()] == list(dtypes)
    assert_as_near(found, plain, exact, unit=2.0**-24 if dtypes[0] == dtypes[2] == torch.float32 else 2.0**-9)


def test_inf_and_nan_stay_where_they_are():
    inputs = tensors()
    with torch.no_grad():
        inputs[1][0, 0, 0], inputs[1][1, 2, 3] = torch.inf, torch.nan
    for found, right in zip(*(step(function, inputs)[1].values() for function in (gated_sum, formula)), strict=True):
        assert torch.equal(found.isfinite(), right.isfinite())


def test_the_gradients_are_formed_in_one_pass(monkeypatch):
    applied = []
    monkeypatch.setattr(module._GatedSum, "apply", lambda *args: applied.append(1) or formula(*args[:3]))
    gated_sum(*tensors())
    with torch.no_grad():
        gated_sum(*tensors())
    assert applied == [1]


def test_transforms_of_functions_are_those_of_before():
    x, branch, gate = (tensor.detach() for tensor in tensors())

    def derivatives(function):
        yield torch.func.jvp(lambda b: function(x, b, gate), (branch,), (torch.ones_like(branch),))[1]
        yield torch.func.grad(lambda g: function(x, branch, g).square().sum())(gate)
        yield torch.vmap(lambda scale: function(x, branch, scale * gate))(torch.arange(4.0))

    for found, right in zip(derivatives(gated_sum), derivatives(formula), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_no_samples():
    assert (
        gated_sum(torch.zeros(0, 7, 24, requires_grad=True), torch.zeros(0, 7, 24), torch.zeros(0, 1, 24)).numel() == 0
    )
