"""`stated_order`: its order of sums, equal bits on every host, and which errors it finds as the reference result."""

import functools

import numpy
import pytest
import torch
import torch.nn.functional as F

from var_kernels import _stated_order
from var_kernels.testing import assert_accurate, randn, stated_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def in_order(function, *args):
    with stated_order():
        return function(*args)


def with_gradients(function, *tensors):
    """The result, and the gradient of each tensor for a fixed gradient of the result."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    dy = randn(y.numel(), seed=90).to(y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(q.shape[2], k.shape[2]).tril(9) > 0)


def strided_conv(x, weight, bias):
    return F.conv2d(x, weight, bias, stride=2, padding=(1, 0), dilation=(1, 2))


# The operators of which the references and the plain results of the tests consist.
CASES = {
    "linear": (F.linear, (2, 35, 300), (40, 300), (40,)),
    "product without bias": (F.linear, (35, 1100), (40, 1100)),
    "batches": (torch.matmul, (2, 3, 17, 24), (2, 3, 24, 33)),
    "product with a vector": (torch.matmul, (9, 31), (31,)),
    "convolution": (functools.partial(F.conv2d, padding=1), (2, 7, 9, 11), (5, 7, 3, 3), (5,)),
    "strided convolution": (strided_conv, (2, 7, 9, 11), (5, 7, 3, 3), (5,)),
    "attention": (attention, (2, 3, 70, 24), (2, 3, 81, 24), (2, 3, 81, 24)),
    "causal attention": (functools.partial(F.scaled_dot_product_attention, is_causal=True), *[(1, 2, 40, 16)] * 3),
    "sums": (lambda x: x.sum((0, 2)).square() + x.sum(), (5, 70, 33)),
    "means": (lambda x: x.mean(1, keepdim=True) * x.mean(), (5, 70, 33)),
    "softmax": (lambda x: x.softmax(1), (5, 70, 33)),
    "logsumexp": (lambda x: x.logsumexp((0, 1)), (5, 70, 33)),
    "unit vectors": (functools.partial(F.normalize, dim=-1), (5, 70, 33)),
    "loss": (F.mse_loss, (300, 200), (300, 200)),
}


@pytest.fixture(params=CASES)
def case(request):
    function, *shapes = CASES[request.param]
    return function, [randn(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def chains(a, b, length):
    """The sum of products of two vectors in float32, in chains of `length` terms, as a loop."""
    totals = []
    for start in range(0, len(a), length):
        total = numpy.float32(0)
        for x, y in zip(a[start : start + length], b[start : start + length], strict=True):
            total = numpy.float32(total + numpy.float32(x * y))
        totals.append(total)
    return functools.reduce(lambda x, y: numpy.float32(x + y), totals)


def sixteen(values):
    """A sum in float32, of 16 terms at a time, as a loop."""
    while len(values) > 1:
        parts = [values[i : i + 16] for i in range(0, len(values), 16)]
        values = [functools.reduce(lambda x, y: numpy.float32(x + y), part) for part in parts]
    return values[0]


def test_products_are_those_of_a_loop():
    x, weight, bias = randn(3, 2600, seed=0), randn(5, 2600, seed=1), randn(5, seed=2)
    expected = [[chains(row, column, 1024) + b for column, b in zip(weight.numpy(), bias.numpy(), strict=True)]
                for row in x.numpy()]  # fmt: skip
    assert torch.equal(in_order(F.linear, x, weight, bias), torch.tensor(numpy.array(expected)))
    # A convolution sums all terms in one chain.
    x, weight = x.view(1, 2600, 1, 3), weight.view(5, 2600, 1, 1)
    expected = [[chains(x[0, :, 0, i].numpy(), row.flatten().numpy(), 2600) for i in range(3)] for row in weight]
    assert torch.equal(in_order(F.conv2d, x, weight)[0, :, 0], torch.tensor(numpy.array(expected)))


def test_sums_are_those_of_a_loop():
    x = randn(3, 700, seed=0)
    assert torch.equal(in_order(lambda: x.sum(1)), torch.tensor([sixteen(list(row)) for row in x.numpy()]))
    assert in_order(lambda: x.mean()) == sixteen(list(x.flatten().numpy())) / numpy.float32(2100)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sixteen_bits_are_rounded_once(dtype):
    x, weight, bias = (randn(*shape, seed=0, dtype=dtype) for shape in ((9, 300), (7, 300), (7,)))
    wide = in_order(F.linear, x.float(), weight.float(), bias.float())
    assert torch.equal(in_order(F.linear, x, weight, bias), wide.to(dtype))
    assert torch.equal(in_order(lambda: x.sum(1)), in_order(lambda: x.float().sum(1)).to(dtype))


def test_the_same_bits_with_other_threads_and_libraries(case, restore_threads, monkeypatch):
    expected = in_order(with_gradients, case[0], *case[1])
    for threads, enabled in ((1, True), (2, False), (3, True)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        found = in_order(with_gradients, case[0], *case[1])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_bits_do_not_depend_on_how_many_sums_run_at_once(case, monkeypatch):
    """A GPU computes more sums at once than a CPU."""
    expected = in_order(with_gradients, case[0], *case[1])
    monkeypatch.setattr(_stated_order, "_AT_ONCE", 100)
    assert all(torch.equal(a, b) for a, b in zip(in_order(with_gradients, case[0], *case[1]), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_pytorch(case, dtype):
    function, tensors = case[0], [tensor.to(dtype) for tensor in case[1]]
    same, exact = (in_order(with_gradients, function, *(x.to(to) for x in tensors)) for to in (dtype, torch.float64))
    for found, plain, wide in zip(with_gradients(function, *tensors), same, exact, strict=True):
        assert found.dtype == plain.dtype and found.shape == plain.shape and found.device == plain.device
        # The limit is 100 roundings, because PyTorch's order depends on the host, and it rounds 16-bit sums oftener.
        band = 100 * torch.finfo(dtype).eps * wide.abs().max()
        assert (plain - wide).abs().max() <= band and (plain.double() - found).abs().max() <= band


def test_float64_is_left_as_it_is(case):
    wide = [tensor.double() for tensor in case[1]]
    expected = with_gradients(case[0], *wide)
    assert all(torch.equal(a, b) for a, b in zip(in_order(with_gradients, case[0], *wide), expected, strict=True))


def test_inference_mode_has_the_same_order(case):
    expected = in_order(case[0], *case[1])
    with torch.inference_mode():
        assert torch.equal(in_order(case[0], *case[1]), expected)


def test_group_norm_and_empty_and_infinite_sums():
    x, weight, bias = randn(2, 6, 5, 7, seed=0), randn(6, seed=1), randn(6, seed=2)
    exact = F.group_norm(x.double(), 3, weight.double(), bias.double())
    assert_accurate(in_order(F.group_norm, x, 3, weight, bias), exact.float(), exact)
    assert in_order(torch.matmul, torch.ones(2, 0), torch.ones(0, 3)).tolist() == [[0.0] * 3] * 2
    assert in_order(lambda: torch.ones(0, 3).sum(0)).tolist() == [0.0] * 3
    assert in_order(lambda: torch.ones(2, 0, 3).softmax(-1)).shape == (2, 0, 3)
    assert in_order(lambda: torch.ones(0).mean()).isnan()
    invisible = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]])
    assert in_order(lambda: invisible.logsumexp(1)).tolist() == [-torch.inf, 0.0]
    torch.testing.assert_close(in_order(lambda: invisible.softmax(1)), invisible.softmax(1), equal_nan=True)


@pytest.mark.parametrize(
    "product",
    [
        lambda: F.conv1d(torch.ones(1, 2, 5), torch.ones(3, 2, 3)),
        lambda: F.conv2d(torch.ones(1, 2, 5, 5), torch.ones(2, 1, 3, 3), groups=2),
        lambda: torch.cdist(torch.ones(30, 2), torch.ones(30, 2)),
        lambda: torch.addmv(torch.ones(2), torch.ones(2, 3), torch.ones(3)),
        lambda: torch.linalg.vector_norm(torch.ones(4), ord=1),
    ],
    ids=["one dimension", "groups", "cdist", "addmv", "ord 1"],
)
def test_never_falls_back_to_the_order_of_the_host(product):
    with pytest.raises(NotImplementedError, match="stated_order: "):
        in_order(product)


# ---- as the reference result ----------------------------------------------------------------------------------------


def problem(dtype, terms=2050):
    x, weight = randn(9, terms, seed=1, dtype=dtype), (randn(560, terms, seed=2) / terms**0.5).to(dtype)
    return x, weight, in_order(F.linear, x, weight), x.double() @ weight.double().T


@pytest.mark.parametrize("terms", [1, 17, 512, 1024, 2050])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_products_of_every_host_pass(dtype, terms):
    """Chains are as long as in oneDNN (1024) and our kernels (512, 240); sums go by halves or in this host's order."""
    x, weight, same, exact = problem(dtype, terms)
    wide = x.float()[:, None] * weight.float()  # (M, N, K)
    for length in (1024, 512, 240, 1):
        found = sum(part.cumsum(-1)[..., -1] for part in wide.split(length, -1)) if length > 1 else wide.sum(-1)
        assert_accurate(found.to(dtype), same, exact, name=f"chains of {length}")
    assert_accurate(F.linear(x, weight), same, exact, name="this host's")


def low_precision(x, weight, dtype, to):
    """A bad kernel, which adds 16 products at a time and keeps the sum in the dtype `to`."""
    total = torch.zeros(9, 560, dtype=to)
    for k in range(0, x.shape[1], 16):
        total = (total.float() + x[:, k : k + 16].float() @ weight[:, k : k + 16].float().T).to(to)
    return total.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, weight, y: low_precision(x, weight, y.dtype, torch.bfloat16),
        lambda x, weight, y: F.linear(x[:, :-1], weight[:, :-1]),
        lambda x, weight, y: F.linear(x[:, 16:], weight[:, 16:]),
        lambda x, weight, y: y[[1, 0, *range(2, 9)]],
        lambda x, weight, y: torch.cat((y[:-1], torch.zeros_like(y[-1:]))),
        lambda x, weight, y: y + weight[:, 3] * x[:, 3:4],
    ],
    ids=["sums in bf16", "last term dropped", "first terms dropped", "rows swapped", "row forgotten", "a term twice"],
)
def test_wrong_products_are_refused(dtype, spoil):
    x, weight, same, exact = problem(dtype)
    with pytest.raises(AssertionError, match="off by more than the derived bound"):
        assert_accurate(spoil(x, weight, same), same, exact)


def test_tf32_and_sums_in_fp16_are_refused_in_fp32():
    x, weight, same, exact = problem(torch.float32)
    tf32 = [(tensor.view(torch.int32) & 0xFFFFE000 - (1 << 32)).view(torch.float32) for tensor in (x, weight)]
    for wrong in (in_order(F.linear, *tf32), low_precision(x, weight, torch.float32, torch.float16)):
        with pytest.raises(AssertionError, match="off by more than the derived bound"):
            assert_accurate(wrong, same, exact)
