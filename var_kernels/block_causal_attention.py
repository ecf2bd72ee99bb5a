"""Block-causal attention: every token sees its own scale and all earlier ones.

This is the attention of next-scale image generation (VAR, arXiv 2404.02905): a sequence has K scales of n_1 ... n_K
tokens, the tokens of one scale are predicted together, and each sees the whole of its own scale and of all earlier
ones. The lengths alone determine the mask, so the kernels skip invisible keys and no L x L tensor ever exists.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch.autograd.function import once_differentiable

from ._checks import as_int, check_same, check_shape, check_tensor, same_floats, unit_inner_stride
from .backends import resolve
from .native.library import autocast_dtype, define, needs_grad, raw_ops, register_fake
from .reference import block_causal_attention as reference

MAX_HEAD_DIM = 256

# The lengths of the scales are `scale_lens` or, if it is given, the int64 CPU tensor `lens`, beside which `scale_lens`
# is empty. Compiled code that gets a tensor serves every schedule, because it reads the lengths when it runs.
define(
    "_block_causal_attention(Tensor q, Tensor k, Tensor v, SymInt[] scale_lens, float softmax_scale, "
    "SymInt q_offset, bool allow_tf32=False, Tensor? lens=None) -> (Tensor out, Tensor lse)",
    __name__,
)
define(
    "_block_causal_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? dlse, SymInt[] scale_lens, float softmax_scale, SymInt q_offset, bool allow_tf32=False, "
    "Tensor? lens=None) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    __name__,
)


@register_fake("_block_causal_attention")
def _fake_forward(q, k, v, scale_lens, softmax_scale, q_offset, allow_tf32=False, lens=None):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_fake("_block_causal_attention_backward")
def _fake_backward(dout, q, k, v, out, lse, dlse, scale_lens, softmax_scale, q_offset, allow_tf32=False, lens=None):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _BlockCausalAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, lens, scale_lens, softmax_scale, q_offset, allow_tf32, backend):
        options = (scale_lens, softmax_scale, q_offset, allow_tf32, lens)
        return raw_ops(backend)._block_causal_attention(q, k, v, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, lens, *ctx.options, ctx.backend = inputs
        ctx.save_for_backward(q, k, v, *output, lens)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, lens = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else unit_inner_stride(dout)
        backward = raw_ops(ctx.backend)._block_causal_attention_backward
        return *backward(dout, q, k, v, out, lse, dlse, *ctx.options, lens), *[None] * 6


def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# Marked as in backends.py. PyTorch guards compiled code by this setting, so another value compiles again.
_tf32_allowed._dynamo_marked_constant = True


def _check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[bool, int, int]:
    """Checks ranks and shapes. Returns whether the three tensors have one dtype and one device, then Lq and Lk."""
    alike = same_floats(q, k, v)
    if not alike or not q.dim() == k.dim() == v.dim() == 4:
        for argument, tensor in (("q", q), ("k", k), ("v", v)):
            check_tensor(argument, tensor, rank=4)
    batch, heads, queries, dim = q.shape
    k_shape = k.shape
    k_batch, kv_heads, keys, k_dim = k_shape
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dimension from 1 to {MAX_HEAD_DIM}, got shape {tuple(q.shape)}")
    if k_batch != batch or k_dim != dim:
        check_shape("k", k, (batch, kv_heads, keys, dim))
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {kv_heads}")
    if v.shape != k_shape:
        check_shape("v", v, k_shape)
    return alike, queries, keys


def _check_lens(lens: torch.Tensor) -> None:
    if lens.dtype != torch.int64:
        raise TypeError(f"scale_lens: expected ints, or a tensor of int64, got {lens.dtype}")
    if lens.dim() != 1 or lens.device.type != "cpu":
        raise ValueError(f"scale_lens: expected shape (K,) on the CPU, got {tuple(lens.shape)} on {lens.device}")


def _checked_schedule(scale_lens: Sequence[int] | torch.Tensor, keys: int) -> list[int]:
    try:
        lens = list(map(as_int, scale_lens.tolist() if isinstance(scale_lens, torch.Tensor) else scale_lens))
    except TypeError:
        raise TypeError(f"scale_lens: expected a sequence of ints, got {scale_lens!r}") from None
    if not lens or any([length <= 0 for length in lens]):
        raise ValueError(f"scale_lens: expected one or more lengths > 0, got {lens}")
    if sum(lens) != keys:
        raise ValueError(f"scale_lens: expected lengths that sum to the {keys} keys, got {lens}, sum {sum(lens)}")
    return lens


def _checked_offset(q_offset: int | None, queries: int, keys: int) -> int:
    offset = keys - queries if q_offset is None else q_offset
    if not isinstance(offset, (int, torch.SymInt)):
        raise TypeError(f"q_offset: expected an int, got {type(offset).__name__}")
    if not 0 <= offset <= keys - queries:
        raise ValueError(f"q_offset: expected 0 to Lk - Lq = {keys} - {queries}, got {offset}")
    return offset


def block_causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_lens: Sequence[int] | torch.Tensor,
    *,
    softmax_scale: float | None = None,
    q_offset: int | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which a query sees every key of its own scale and of all earlier scales.

    Query row i is token ``t = q_offset + i``, and ``end(t)`` is the end of the scale that holds token t::

        scores[i, j] = softmax_scale * <q[i], k[j]>      for j < end(t); invisible keys have no influence
        lse[i]       = log(sum_j exp(scores[i, j]))
        out[i]       = sum_j exp(scores[i, j] - lse[i]) * v[j]

    All scales of length 1 give plain causal attention, one single scale gives full attention.

    Args:
        q: Queries (B, H, Lq, D), head dimension D from 1 to 256.
        k: Keys (B, Hkv, Lk, D). H is a multiple of Hkv: query head h reads key head ``h // (H // Hkv)``.
        v: Values, the shape of k.
        scale_lens: Tokens per scale, ints > 0 with sum Lk; or the same as an int64 tensor (K,) on the CPU. Under
            ``torch.compile(dynamic=True)`` a tensor is for schedules that change from call to call: the kernels read it
            when they run, and check it there (RuntimeError), so that nothing is compiled again. For a sequence code is
            compiled once for each number of scales.
        softmax_scale: Factor of the scores, default ``1 / sqrt(D)``.
        q_offset: Token index of the first query row, default ``Lk - Lq``: the queries are the last Lq tokens, as in a
            step against a key-value cache.
        backend: ``"auto"``, or the name of one backend, which then serves the call or raises.
        return_lse: Also return the log-sum-exp; gradients flow through it.

    Returns:
        out (B, H, Lq, D) in q's dtype and, in the kernels, in q's memory layout: for q a view of (B, L, H, D) memory,
        ``out.transpose(1, 2)`` is contiguous. With `return_lse` also lse (B, H, Lq), float32 (float64 for float64
        inputs). An empty batch or Lq = 0 gives empty results.

    The three tensors share dtype (float32, bfloat16, float16; float64 by the reference) and device. Any strides are
    taken without a copy if the last dimension is dense. Sums and softmax are float32; docs/numerics.md says where
    16-bit operands are multiplied as such. The result does not depend on the number of threads. On a GPU, products of
    float32 use TF32 if PyTorch's setting for matrix products allows it: one TF32 product for each in Triton; in CUDA
    C++ three, which restore the accuracy that one loses. Under autocast q, k and v are cast to the autocast dtype, as
    for scaled_dot_product_attention. NaN and infinite values propagate as in PyTorch. First derivatives only.

    Raises:
        TypeError: A dtype is not supported or differs from q's, or `scale_lens` holds something other than ints.
        ValueError: A shape, device, length or offset is wrong; the message names the argument. Also if `backend` is
            unknown or cannot serve the call.

    Source: Tian et al., Visual Autoregressive Modeling, arXiv 2404.02905; the online softmax and the recomputation
    from lse are those of FlashAttention, arXiv 2205.14135.
    """
    alike, queries, keys = _check_inputs(q, k, v)
    if isinstance(scale_lens, torch.Tensor):
        _check_lens(scale_lens)
    offset = _checked_offset(q_offset, queries, keys)
    device_type = q.device.type
    cast = autocast_dtype(device_type)
    if cast is not None and torch.float64 not in (q.dtype, k.dtype, v.dtype):
        q, k, v = q.to(cast), k.to(cast), v.to(cast)
    if not alike:
        check_same("q", q, k=k, v=v)
    scale = 1.0 / math.sqrt(q.shape[3]) if softmax_scale is None else float(softmax_scale)
    backend = resolve("block_causal_attention", backend, device_type, q.dtype)
    if backend != "reference" and isinstance(scale_lens, torch.Tensor) and torch.compiler.is_compiling():
        schedule, lens = scale_lens, []  # the lengths are not known before the code runs
    else:
        schedule, lens = None, _checked_schedule(scale_lens, keys)
    if backend == "reference":
        # Autocast is switched off here, because it would cast the products of the reference again.
        with nullcontext() if cast is None else torch.autocast(device_type, enabled=False):
            out, lse = reference.block_causal_attention(q, k, v, lens, scale, offset)
    else:
        if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
            q, k, v = unit_inner_stride(q), unit_inner_stride(k), unit_inner_stride(v)
        allow_tf32 = backend != "cpu" and q.dtype == torch.float32 and _tf32_allowed()
        if needs_grad(q, k, v):
            out, lse = _BlockCausalAttention.apply(q, k, v, schedule, lens, scale, offset, allow_tf32, backend)
        else:
            out, lse = raw_ops(backend)._block_causal_attention(q, k, v, lens, scale, offset, allow_tf32, schedule)
    return (out, lse) if return_lse else out
