"""gated_residual_adaln with an fp32 x and a 16-bit branch: the values are those in fp32, y rounded to 16 bits."""

import pytest
import torch

from tests.kernels.adaln_layer_norm.contract import mixed_inputs, rotated_forms
from var_kernels import gated_residual_adaln
from var_kernels.testing import poison

DTYPES = (torch.bfloat16, torch.float16)
# Rows of whole vectors, rows with tails, and rows of whole cache lines in both dtypes.
SHAPES = [(2, 5, 3), (1, 7, 31), (2, 49, 64), (2, 49, 83), (3, 50, 2304)]


def assert_same_values(tensors, backend: str) -> None:
    """The result has the bits of an fp32 call with the branch widened, whose y is rounded once."""
    x, branch, *rest = tensors
    expected, wide = gated_residual_adaln(x, branch.float(), *rest, backend=backend)
    poison()
    residual, y = gated_residual_adaln(x, branch, *rest, backend=backend)
    assert residual.dtype == torch.float32 and y.dtype == branch.dtype
    assert torch.equal(residual, expected) and torch.equal(y, wide.to(branch.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_values(cpu, dtype):
    for index, shape in enumerate(SHAPES):
        assert_same_values(mixed_inputs(shape, dtype, seed=index, forms=rotated_forms(index)), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype):
    assert_same_values(mixed_inputs((2, 5, 24), dtype), "reference")


@pytest.mark.parametrize("channels", [2304, 2310, 2320], ids=["whole lines", "not aligned", "only in fp32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_past_the_caches(cpu, dtype, channels):
    length = 24 * 2**20 // (12 * channels) + 1
    assert_same_values(mixed_inputs((1, length, channels), dtype), "cpu")


def test_strided_branch(cpu):
    x, branch, *rest = mixed_inputs((2, 6, 40), torch.bfloat16)
    expected = gated_residual_adaln(x, branch, *rest, backend="cpu")
    for view in (branch.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([branch, branch], dim=-1)[..., 0]):
        found = gated_residual_adaln(x, view, *rest, backend="cpu")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_are_those_of_the_converted_branch(request, backend):
    if backend == "cpu":
        request.getfixturevalue("cpu")
    tensors = [tensor.requires_grad_() for tensor in mixed_inputs((2, 9, 24), torch.bfloat16)]
    residual, y = gated_residual_adaln(*tensors, backend=backend)
    x, branch, *rest = tensors
    expected, wide = gated_residual_adaln(x, branch.float(), *rest, backend=backend)
    assert torch.equal(residual, expected) and torch.equal(y, wide.bfloat16())
    found = torch.autograd.grad(residual.sum() + y.float().square().sum(), tensors)
    wanted = torch.autograd.grad(expected.sum() + wide.bfloat16().float().square().sum(), tensors)
    for gradient, other, tensor in zip(found, wanted, tensors, strict=True):
        assert gradient.dtype == tensor.dtype and torch.equal(gradient, other)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty(shape):
    residual, y = gated_residual_adaln(*mixed_inputs(shape, torch.bfloat16))
    assert residual.shape == y.shape == shape and (residual.dtype, y.dtype) == (torch.float32, torch.bfloat16)


def test_opcheck_and_arguments_of_the_raw_op(cpu):
    op = torch.ops.var_kernels._gated_residual_adaln
    x, branch, *rest = mixed_inputs((2, 5, 20), torch.bfloat16)
    torch.library.opcheck(op.default, (x, branch, *rest, 1e-6))
    for message, arguments in {
        "branch: expected BFloat16, got Half": (x.bfloat16(), branch.half()),
        "branch: expected BFloat16, got Float": (x.bfloat16(), branch.float()),
        "branch: expected Float, got Double": (x, branch.double()),
        "branch: expected 20, got 19 channels": (x, branch[..., :19]),
        "branch: expected the shape of x": (x, branch[:, :4]),
    }.items():
        modulation = [tensor.to(arguments[0].dtype) for tensor in rest]
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, *modulation, 1e-6)


def test_wrong_branches():
    x, branch, *rest = mixed_inputs((2, 3, 6), torch.bfloat16)
    with pytest.raises(TypeError, match="branch: expected torch.bfloat16 beside x in torch.bfloat16"):
        gated_residual_adaln(x.bfloat16(), x, *(tensor.bfloat16() for tensor in rest))
    with pytest.raises(ValueError, match="branch: expected device cpu like x, got meta"):
        gated_residual_adaln(x, branch.to("meta"), *rest)


def test_autocast_still_converts_the_branch():
    x, branch, *rest = mixed_inputs((2, 3, 6), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        residual, y = gated_residual_adaln(x, branch, *rest)
    assert residual.dtype == y.dtype == torch.float32


def test_compile(cpu):
    tensors = mixed_inputs((2, 5, 20), torch.bfloat16)
    compiled = torch.compile(gated_residual_adaln, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*tensors), gated_residual_adaln(*tensors), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
