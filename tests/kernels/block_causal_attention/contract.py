"""What the tests of every backend of attention share: comparisons of values and gradients with fp64."""

from itertools import accumulate

import torch
import torch.nn.functional as F

from var_kernels import block_causal_attention
from var_kernels.testing import assert_accurate, poison, randn, stated_order

RAW = torch.ops.var_kernels


def visible(lens, first: int, queries: int) -> torch.Tensor:
    """The mask (Lq, Lk), true where a query sees a key."""
    ends = torch.tensor([end for length, end in zip(lens, accumulate(lens), strict=True) for _ in range(length)])
    return torch.arange(sum(lens)) < ends[first : first + queries, None]


def plain(q, k, v, lens, *, q_offset=None, softmax_scale=None) -> torch.Tensor:
    """The same attention in plain PyTorch: scaled_dot_product_attention with a mask."""
    first = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(lens, first, q.shape[2]), scale=softmax_scale)


def with_grads(attention, inputs, dout, dtype=None):
    """out, dq, dk and dv of an implementation, computed in `dtype`."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


def references(inputs, lens, **options):
    """(out, lse) of the reference in the dtype of the inputs, and in float64."""
    with stated_order():
        same, exact = (
            block_causal_attention(
                *(x.to(dtype) for x in inputs), lens, backend="reference", return_lse=True, **options
            )
            for dtype in (inputs[0].dtype, torch.float64)
        )
    return same, exact


def check(inputs, lens, *, backend="cpu", rows_cancel=False, **options) -> None:
    """Forward and backward are as accurate as plain PyTorch in the same dtype, and every element is written.

    dS = P (dP - delta) is a difference, and where it cancels, a row of dq or dk consists of rounding errors. With
    `rows_cancel`, too many rows are like that, and errors of dq and dk are compared with the largest element instead.
    For few queries, a row of dv is hardly more than one P = exp(score - lse) times dout, and a row of dk is one dS
    times q. Their bounds therefore include the error of P that comes from rounding the score and lse once each.
    """
    q, k, v = inputs
    dout = randn(*q.shape, seed=99, dtype=q.dtype)
    poison(*inputs)
    actual = with_grads(lambda *x: block_causal_attention(*x, lens, backend=backend, **options), inputs, dout)
    with stated_order():
        same = with_grads(lambda *x: plain(*x, lens, **options), inputs, dout)
    exact = with_grads(
        lambda *x: block_causal_attention(*x, lens, backend="reference", **options), inputs, dout, torch.float64
    )
    for name, *results in zip(("out", "dq", "dk", "dv"), actual, same, exact, strict=True):
        if name in ("dq", "dk") and not results[2].any():  # Each query sees one key: dP - delta is a rounding error.
            rounding = 2 * q.shape[-1] * torch.finfo(q.dtype).eps * dout.abs().max() * v.abs().max()
            assert results[0].abs().max() <= rounding * (k if name == "dq" else q).abs().max()
            continue
        if name in ("dk", "dv") and q.shape[2] < 8:
            peak = (q.double().flatten(0, 2) @ k.double().flatten(0, 2).T).abs().max() * (
                options.get("softmax_scale") or q.shape[-1] ** -0.5)
            rounding = torch.finfo(q.dtype).eps * (1 + peak) * results[2].abs().max()
            plain_error, error = ((x.double() - results[2]).abs().max() for x in (results[1], results[0]))
            assert error <= 2 * (plain_error + rounding)
            continue
        if rows_cancel and name in ("dq", "dk"):
            results = [x.flatten() for x in results]
        assert_accurate(*results, name=name)
