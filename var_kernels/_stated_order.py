"""Plain PyTorch with its sums in one stated order, the same on every host: kernels are compared with its error.

MKL, oneDNN, OpenBLAS or cuBLAS chooses the order in which a matrix product is summed, and the choice depends on the
processor, the shape and the number of threads. A bound made from their error holds on one host and fails on another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

_CHAIN = 1024  # how many terms of a matrix product are added one after another
_FEW = 16  # how many terms of any other sum are added one after another
# How many sums grow together. So many stay in the caches, and are too few for PyTorch to wake its threads.
_AT_ONCE = 32000

aten = torch.ops.aten


def stated_order() -> TorchDispatchMode:
    """A context in which PyTorch sums float32, bfloat16 and float16 in the order below; it leaves float64 as it is.

    - **Matrix products** (``mm``, ``bmm``, ``addmm``, ``mv``, …): each product of two elements is rounded to float32,
      1024 of them are added one after another in float32, then those sums one after another, then the bias. Products
      of 16-bit operands are exact, and a 16-bit result is rounded once, at the end.
    - **Two-dimensional convolutions** and their backward: likewise, but all terms form one chain. The terms are ordered
      by channel, then by tap; for the gradient of the weight they are ordered by image, then by pixel.
    - **Other sums** (``sum``, ``mean``, ``mse_loss``, ``softmax``, ``logsumexp``, norms, ``group_norm``): 16 terms are
      added one after another, then 16 of those sums, and so on, in float32. PyTorch's own cascade is similar, but it
      is cut among threads, so its order depends on their number. A variance is the mean of the squared differences
      from the mean.
    - **Attention** (``scaled_dot_product_attention`` on a CPU): these products and sums in float32, but probabilities,
      and in the backward gradients of scores, are rounded to the dtype before they are multiplied, as in every kernel.

    All sums are made of elementwise operations that IEEE 754 rounds in one way. Functions such as exp and tanh, and
    interpolation, remain those of PyTorch, which are off by a few roundings on every host.

    Why these lengths: if these sums were more accurate than those of a reasonable kernel on some host, right results
    would fail there. The table has largest errors, as multiples of the error of chains of 512 terms, for 9 rows of x
    and 560 columns of W, with sums of 1024 terms:

    =======================================  ====
    MKL, AVX-512                             0.27
    MKL, AVX2                                0.62
    this package's kernel, chains of 512     1.10
    oneDNN, AVX-512 and AMX                  1.10
    oneDNN, AVX2                             2.13
    a chain of 1024                          2.23
    =======================================  ====

    With 4096 terms oneDNN reaches 1.7, and chains of 1024 reach 1.6 to 2. oneDNN's convolutions of channels-last
    images over 2880 terms have 1.3 times the error of one chain of all the terms. They have 1.8 times the error of
    chains of 1024, which is too near to the factor two of :func:`var_kernels.testing.assert_accurate`; so convolutions
    use one chain. Sums in bfloat16 instead of float32 are 65536 times less accurate, and one forgotten term of 4096 is
    a hundred times the bound.

    Raises NotImplementedError for a product that has no stated order (convolutions in one or three dimensions, in
    groups or transposed, complex dtypes, …); it never falls back to the order of the host.
    """
    return _StatedOrder()


class _StatedOrder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not _is_rounded(args):
            return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _ORDERS:
            return _ORDERS[packet](*args, **kwargs)
        with self:  # under inference_mode composite operations arrive here; decomposing shows what they are made of
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if packet in _WITHOUT_ORDER:
            raise NotImplementedError(f"stated_order: {func} has no stated order of summation")
        return func(*args, **kwargs)


def _is_rounded(args: Sequence[Any]) -> bool:
    first = next((arg for arg in args if isinstance(arg, torch.Tensor)), None)
    return first is not None and first.dtype in (torch.float32, torch.bfloat16, torch.float16)


# ---- the two orders --------------------------------------------------------------------------------------------------


def _product(a: torch.Tensor, b: torch.Tensor, chain: int = _CHAIN) -> torch.Tensor:
    """a (..., M, K) times b (..., K, N), in float32: chains of at most `chain` terms, then their sum."""
    if b.shape[-1] < a.shape[-2]:  # the longer side becomes the inner one, for vector instructions; no bit changes
        return _product(b.mT, a.mT, chain).mT
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    (rows, terms), columns = a.shape[-2:], b.shape[-1]
    y = a.new_zeros(math.prod(batch), rows, columns, dtype=torch.float32)
    if terms == 0 or y.numel() == 0:
        return y.view(*batch, rows, columns)
    length = min(chain, terms)
    count = -(-terms // length)
    padding = count * length - terms  # zeros, which change no sum
    a = F.pad(a.float().expand(*batch, rows, terms).reshape(-1, rows, terms), (0, padding))
    b = F.pad(b.float().expand(*batch, terms, columns).reshape(-1, terms, columns), (0, 0, 0, padding))
    a = a.unflatten(-1, (count, length)).permute(3, 0, 2, 1).unsqueeze(-1).contiguous()  # (length, B, count, M, 1)
    b = b.unflatten(-2, (count, length)).permute(2, 0, 1, 3).unsqueeze(-2).contiguous()  # (length, B, count, 1, N)
    at_once = _AT_ONCE if y.is_cpu else 1 << 24
    images, part = max(1, at_once // (count * rows * columns)), max(1, at_once // (count * columns))
    for y_i, a_i, b_i in zip(y.split(images), a.split(images, 1), b.split(images, 1), strict=True):
        for y_ij, a_ij in zip(y_i.split(part, 1), a_i.split(part, 3), strict=True):
            y_ij.copy_(_chain(_sum_of_products(a_ij, b_i).unbind(1)))
    return y.view(*batch, rows, columns)


def _sum_of_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of a·b along dimension 0, one product after another."""
    (first, *others), (b_first, *b_others) = a.unbind(), b.unbind()
    sums = first * b_first
    term = torch.empty_like(sums)
    for x, y in zip(others, b_others, strict=True):
        # Two operations: a fused multiply-add rounds the product on some hosts only.
        torch.mul(x, y, out=term)
        sums.add_(term)
    return sums


def _chain(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the terms, one after another."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _sum(x: torch.Tensor, dim: Sequence[int] | int | None = None, keepdim: bool = False) -> torch.Tensor:
    """The float32 sum along dimensions, 16 terms at a time; the first of `dim` varies slowest in the order of terms."""
    dims = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    dims = sorted(d % x.dim() for d in dims) if x.dim() else []
    kept = [size for d, size in enumerate(x.shape) if d not in dims]
    shape = [1 if d in dims else size for d, size in enumerate(x.shape)] if keepdim else kept
    terms = x.float().permute(*dims, *(d for d in range(x.dim()) if d not in dims))
    terms = terms.flatten(0, len(dims) - 1) if dims else terms.unsqueeze(0)
    if terms.shape[0] == 0:
        return x.new_zeros(shape, dtype=torch.float32)
    while terms.shape[0] > 1:
        few = min(_FEW, terms.shape[0])
        padding = terms.new_zeros(-terms.shape[0] % few, *kept)
        terms = _chain(torch.cat((terms, padding)).unflatten(0, (-1, few)).unbind(1))
    return terms[0].reshape(shape)


def _mean(x: torch.Tensor, dim: Sequence[int] | int | None = None, keepdim: bool = False) -> torch.Tensor:
    total = _sum(x, dim, keepdim)
    return total / (x.numel() / total.numel() if total.numel() else math.nan)


# ---- PyTorch's operations, by name -----------------------------------------------------------------------------------

_ORDERS: dict[Any, Callable] = {}


def _serves(*packets: Any) -> Callable:
    """A decorator that registers a function to be called in place of these operations."""

    def register(function: Callable) -> Callable:
        _ORDERS.update(dict.fromkeys(packets, function))
        return function

    return register


@_serves(aten.mm, aten.bmm)
def _matmul(a, b):
    return _product(a, b).to(a.dtype)


@_serves(aten.addmm, aten.baddbmm)
def _plus_matmul(bias, a, b, *, beta=1, alpha=1):
    product = _product(a, b) * alpha
    return (product if beta == 0 else product + bias.float() * beta).to(a.dtype)


@_serves(aten.mv)
def _matvec(a, x):
    return _matmul(a, x.unsqueeze(-1)).squeeze(-1)


@_serves(aten.dot)
def _dot(x, y):
    return _matmul(x.unsqueeze(0), y.unsqueeze(-1)).view(())


@_serves(aten.sum)
def _sum_rounded(x, dim=None, keepdim=False, *, dtype=None):
    return _sum(x if dtype is None else x.to(dtype), dim, keepdim).to(dtype or x.dtype)


@_serves(aten.mean)
def _mean_rounded(x, dim=None, keepdim=False, *, dtype=None):
    return _mean(x if dtype is None else x.to(dtype), dim, keepdim).to(dtype or x.dtype)


@_serves(aten.mse_loss)
def _mse_loss(x, target, reduction=1):
    squares = (x.float() - target.float()).square()
    return (squares, _mean(squares), _sum(squares))[reduction].to(x.dtype) if reduction else squares.to(x.dtype)


@_serves(aten._softmax)
def _softmax(x, dim, half_to_float):
    exps = (x.float() - x.float().amax(dim, keepdim=True)).exp()
    return (exps / _sum(exps, dim, keepdim=True)).to(torch.float32 if half_to_float else x.dtype)


@_serves(aten.logsumexp)
def _logsumexp(x, dim, keepdim=False):
    largest = x.float().amax(dim, keepdim=True)
    offset = largest.where(largest.isfinite(), 0)
    total = _sum((x.float() - offset).exp(), dim, keepdim=True).log() + offset
    return (total if keepdim else total.squeeze(dim)).to(x.dtype)


@_serves(aten.linalg_vector_norm)
def _vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    if ord != 2:
        raise NotImplementedError(f"stated_order: linalg_vector_norm: expected ord 2, got {ord}")
    return _sum(x.float().square(), dim, keepdim).sqrt().to(dtype or x.dtype)


@_serves(aten.native_group_norm)
def _group_norm(x, weight, bias, batch, channels, pixels, groups, eps):
    flat = x.float().reshape(batch, groups, -1)
    mean = _mean(flat, -1, keepdim=True)
    rstd = 1 / (_mean((flat - mean).square(), -1, keepdim=True) + eps).sqrt()
    y = ((flat - mean) * rstd).reshape(batch, channels, pixels)
    y = y if weight is None else y * weight.float().view(-1, 1)
    y = y if bias is None else y + bias.float().view(-1, 1)
    return y.reshape(x.shape).to(x.dtype), mean.view(batch, groups).to(x.dtype), rstd.view(batch, groups).to(x.dtype)


def _check_convolution(transposed, groups, weight) -> None:
    if transposed or groups != 1 or weight.dim() != 4:
        raise NotImplementedError(
            "stated_order: convolution: expected two dimensions, one group and not transposed, got "
            f"{weight.dim() - 2} dimensions, {groups} groups, transposed={transposed}"
        )


@_serves(aten.convolution)
def _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    _check_convolution(transposed, groups, weight)
    columns = F.unfold(x.float(), weight.shape[2:], dilation, padding, stride)  # (B, C·taps, pixels)
    y = _product(weight.flatten(1), columns, columns.shape[1])
    y = y if bias is None else y + bias.float().view(-1, 1)
    sides = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    return y.unflatten(-1, sides).to(x.dtype)


@_serves(aten.convolution_backward)
def _convolution_backward(
    dy, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
):
    _check_convolution(transposed, groups, weight)
    rows, window = dy.flatten(2), (weight.shape[2:], dilation, padding, stride)
    dx = dweight = dbias = None
    if output_mask[0]:
        columns = _product(weight.flatten(1).mT, rows, weight.shape[0])
        dx = F.fold(columns, x.shape[2:], *window).to(x.dtype)
    if output_mask[1]:
        columns = F.unfold(x.float(), *window).transpose(0, 1).flatten(1)  # (C·taps, B·pixels)
        dweight = _product(rows.transpose(0, 1).flatten(1), columns.mT, columns.shape[1])
        dweight = dweight.view(weight.shape).to(weight.dtype)
    if output_mask[2]:
        dbias = _sum(rows, (0, 2)).to(weight.dtype)
    return dx, dweight, dbias


def _scores(q, k, causal, mask, scale) -> torch.Tensor:
    scores = _product(q, k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()


def _check_dropout(dropout_p) -> None:
    if dropout_p:
        raise NotImplementedError(f"stated_order: attention: expected no dropout, got {dropout_p}")


@_serves(aten._scaled_dot_product_flash_attention_for_cpu)
def _attention(q, k, v, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    _check_dropout(dropout_p)
    scores = _scores(q, k, is_causal, attn_mask, scale)
    lse = _logsumexp(scores, -1)
    exps = (scores - scores.amax(-1, keepdim=True)).exp()
    out = _product(exps.to(v.dtype), v) / _sum(exps, -1, keepdim=True)
    return out.to(q.dtype), lse


@_serves(aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _attention_backward(dout, q, k, v, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    _check_dropout(dropout_p)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = (_scores(q, k, is_causal, attn_mask, scale) - lse.unsqueeze(-1)).exp()
    delta = _sum(dout.float() * out.float(), -1, keepdim=True)
    ds = (p * (_product(dout, v.mT) - delta)).to(q.dtype)
    dq, dk, dv = _product(ds, k) * scale, _product(ds.mT, q) * scale, _product(p.to(dout.dtype).mT, dout)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# PyTorch leaves these products to a library of the host, or to a kernel with its own order.
_WITHOUT_ORDER = {
    getattr(aten, name)
    for name in (
        "_addmm_activation", "_cdist_forward", "_convolution", "_euclidean_dist",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention", "addbmm", "addmv", "linear", "linear_backward", "mkldnn_convolution",
        "mkldnn_linear", "vdot",
    )
}  # fmt: skip
