"""The CPU kernels on random problems, which differ in shape, schedule, layout, dtype and logits, against float64.

Every run has a few examples. `pytest tests/kernels/test_cpu_differential.py --hypothesis-profile=long` takes about ten
minutes, and `--hypothesis-seed=N` repeats a run. The end of docs/numerics.md describes the last long run.
"""

from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.kernels.adaln_layer_norm.contract import FORMS, values_and_gradients
from tests.kernels.adaln_layer_norm.contract import inputs as adaln_inputs
from tests.kernels.multi_scale_quantize.contract import composition, gradients, inputs, leaves
from tests.kernels.nearest_code.contract import assert_nearest
from var_kernels import block_causal_attention, multi_scale_quantize, nearest_code
from var_kernels.testing import poison, randn

DTYPES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
SEEDS = st.integers(0, 2**30)

pytestmark = pytest.mark.usefixtures("cpu")


def random_test(**strategies):
    """Runs a test on random arguments, as many times as the profile says.

    The health checks are off, because the fixture only skips tests and some draws take a second.
    """

    def wrap(function):
        relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
        return relaxed(given(**strategies)(function))

    return wrap


def attention_bounds(q, k, v, dout, lens, scale, dtype):
    """out, lse, dq, dk and dv in float64, and bounds of the errors of their elements.

    u is the unit roundoff of fp32, e that of `dtype`. A score sums D products: its error, and with it the relative
    error of P, is below (D + 12) u times the sum of the products' magnitudes, the exponential and lse among the 12. In
    16 bits P, dS and every result are rounded once more. δ is computed from the rounded out. The error of a sum is
    bounded with the sum of the magnitudes, times (L + 8) u. A P or dS below the smallest normal number may be 0.
    """
    group = q.shape[1] // k.shape[1]
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    ends = torch.tensor([end for length, end in zip(lens, accumulate(lens), strict=True) for _ in range(length)])
    visible = torch.arange(len(ends)) < ends[len(ends) - q.shape[2] :, None]
    unit, narrow = 2.0**-24, torch.finfo(dtype).eps / 2
    rounded = 0.0 if dtype == torch.float32 else narrow
    scores = (q @ keys.mT * scale).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse).exp()
    magnitude = (q.abs() @ keys.abs().mT * abs(scale)).amax(-1, keepdim=True) + lse.abs() + 1
    p_error = (q.shape[3] + 12) * unit * magnitude + rounded  # relative, per row
    sums = (sum(lens) + 8) * unit
    out = p @ values
    p_floor = torch.finfo(torch.float32).smallest_normal
    out_error = ((p_error * 2 + sums) * p + p_floor) @ values.abs() + narrow * out.abs()
    dp, delta = dout @ values.mT, (dout * out).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    terms = dout.abs() @ values.abs().mT + (dout.abs() * out.abs()).sum(-1, keepdim=True)
    delta_error = (dout.abs() * out_error).sum(-1, keepdim=True)
    ds_error = p * ((2 * p_error + rounded + sums) * terms + delta_error) + p_floor * (terms + 1)

    def grouped(x):
        return x.unflatten(1, (-1, group)).sum(2)

    exact = [out, lse[..., 0], scale * ds @ keys, grouped(scale * ds.mT @ q), grouped(p.mT @ dout)]
    errors = [
        out_error,
        (p_error + sums)[..., 0],
        abs(scale) * (ds_error @ keys.abs() + sums * ds.abs() @ keys.abs()),
        grouped(abs(scale) * (ds_error.mT @ q.abs() + sums * ds.abs().mT @ q.abs())),
        grouped(((2 * p_error + sums) * p + p_floor).mT @ dout.abs()),
    ]
    tiny = torch.finfo(dtype).smallest_normal * (1 + abs(scale))  # a sum may be flushed to 0 before it is scaled
    return exact, [error + narrow * value.abs() + tiny for error, value in zip(errors, exact, strict=True)]


@random_test(
    lens=st.lists(st.one_of(st.integers(1, 30), st.integers(1, 160)), min_size=1, max_size=7),
    dim=st.one_of(st.integers(1, 40), st.sampled_from((64, 72, 96, 120, 126, 128, 200, 256))),
    heads=st.sampled_from(((1, 1), (2, 1), (3, 3), (6, 2))),
    batch=st.integers(1, 2),
    queries=st.floats(0, 1),
    logits=st.sampled_from((0.01, 1.0, 8.0, 60.0)),
    packed=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_block_causal_attention(lens, dim, heads, batch, queries, logits, packed, dtype, seed):
    length, (heads, kv_heads) = sum(lens), heads
    rows = max(1, round(queries * length))
    if packed:
        q, k, v = randn(batch, length, 3, heads, dim, seed=seed, dtype=dtype).permute(2, 0, 3, 1, 4)
    else:
        q, k, v = randn(3, batch, heads, length, dim, seed=seed, dtype=dtype)
    q, k, v = q[:, :, length - rows :], k[:, :kv_heads], v[:, :kv_heads]
    scale = logits / dim**0.5
    dout = randn(*q.shape, seed=seed + 1, dtype=dtype)
    poison(q, k, v)
    q, k, v = tensors = leaves((q, k, v))
    out, lse = block_causal_attention(q, k, v, lens, softmax_scale=scale, backend="cpu", return_lse=True)
    actual = [out.detach(), lse.detach(), *torch.autograd.grad(out, tensors, dout)]
    exact, bounds = attention_bounds(*(x.detach() for x in tensors), dout, lens, scale, dtype)
    for name, found, value, bound in zip(("out", "lse", "dq", "dk", "dv"), actual, exact, bounds, strict=True):
        worst = ((found.double() - value).abs() / bound).max().item()
        assert worst <= 1, f"{name}: {worst:.2f} times the bound"


@random_test(
    op=st.sampled_from(("adaln", "gated")),
    shape=st.tuples(st.integers(1, 3), st.one_of(st.integers(1, 12), st.integers(40, 110)), st.integers(4, 300)),
    forms=st.tuples(*(st.sampled_from(FORMS) for _ in range(3))),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_adaln(op, shape, forms, dtype, seed):
    tensors = adaln_inputs(op, shape, seed=seed, dtype=dtype, forms=forms)
    poison(*tensors)
    actual, plain = (values_and_gradients(op, tensors, backend) for backend in ("cpu", "reference"))
    exact = values_and_gradients(op, [t.double() for t in tensors], "reference", upstream=dtype)
    for name, true in exact.items():
        # With few elements, plain PyTorch's error depends on chance: the limit is four times it plus four roundings.
        allowed = 4 * ((plain[name] - true).abs().max() + torch.finfo(dtype).eps * true.abs().max())
        assert (actual[name] - true).abs().max() <= allowed, name


@random_test(
    rows=st.integers(1, 300),
    codes=st.integers(1, 700),
    channels=st.integers(1, 130),
    spread=st.sampled_from((1.0, 1e-3)),
    metric=st.sampled_from(("l2", "cosine")),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_nearest_code(rows, codes, channels, spread, metric, dtype, seed):
    z, codebook = (randn(n, channels, seed=seed + n, std=spread).add(1).to(dtype) for n in (rows, codes))
    assert_nearest(nearest_code(z, codebook, metric=metric, backend="cpu"), z, codebook, metric)


@random_test(
    batch=st.integers(1, 10),
    channels=st.integers(4, 40),
    codes=st.integers(1, 200),
    convolutions=st.integers(1, 4),
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    seed=SEEDS,
)
def test_multi_scale_quantize(batch, channels, codes, convolutions, sizes, seed):
    shape = (batch, channels, codes, convolutions, tuple(sizes))
    tensors = leaves(inputs(shape, seed=seed))
    exact = leaves(tensors, torch.float64)
    tokens, f_hat, loss, gap = composition(*exact, sizes)
    assume(gap > 1e-3)  # fp32 may resolve a near-tie either way, which changes what follows
    found = multi_scale_quantize(*tensors, sizes, backend="cpu")
    assert torch.equal(found.tokens, tokens)
    torch.testing.assert_close(found.f_hat.double(), f_hat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.vq_loss.double(), loss, rtol=1e-5, atol=1e-7)
    reference = multi_scale_quantize(*exact, sizes, backend="reference")
    pairs = zip(gradients(found, tensors), gradients(reference, exact), strict=True)
    for name, (mine, true) in zip(("f", "codebook", "phi_weight", "phi_bias"), pairs, strict=True):
        torch.testing.assert_close(
            mine.double(), true, rtol=0, atol=1e-4 * true.abs().max().item() + 1e-8, msg=lambda m, n=name: f"d{n}: {m}"
        )
