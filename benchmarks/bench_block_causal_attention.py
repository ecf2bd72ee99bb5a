"""Attention with the block-causal mask of next-scale prediction, beside every way to compute it with PyTorch."""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from var_kernels import block_causal_attention
from var_kernels.testing import attention_inputs, randn, scale_lens, stated_order

from .harness import Call, Case, Judge, compiled, judge_floats, only_on, our_providers, plain_part
from .table import Work


class Inputs(NamedTuple):
    """q has the last Lq tokens; `visible` is (Lq, Lk), None if all are visible; `dout` is None in forward cases."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lens: tuple[int, ...]
    visible: torch.Tensor | None
    dout: torch.Tensor | None


def make_inputs(batch, heads, head_dim, lens, dtype, backward, queries=None) -> Inputs:
    keys = sum(lens)
    q, k, v = attention_inputs(batch, heads, keys, head_dim, seed=0, dtype=dtype, query_length=queries, logit_std=2.0)
    scale = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    visible = scale[keys - q.shape[2] :, None] >= scale[None, :]
    dout = randn(*q.shape, seed=9, dtype=dtype) if backward else None
    for tensor in (q, k, v):
        tensor.requires_grad_(backward)
    return Inputs(q, k, v, lens, None if visible.all() else visible, dout)


def timed(attention, inputs: Inputs) -> Call:
    """One call of `attention(q, k, v)`: its output, and its gradients if the case has a backward."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if inputs.dout is None:
        return torch.no_grad()(lambda: attention(q, k, v))

    def step():
        out = attention(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), inputs.dout)

    return step


def ours(inputs: Inputs, backend: str) -> Call:
    return timed(lambda q, k, v: block_causal_attention(q, k, v, inputs.lens, backend=backend), inputs)


def sdpa_bool(inputs: Inputs) -> Call:
    return timed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.visible), inputs)


def sdpa_additive(inputs: Inputs) -> Call:
    bias = torch.zeros_like(inputs.visible, dtype=inputs.q.dtype).masked_fill(~inputs.visible, -torch.inf)
    return timed(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias), inputs)


def _spans(lens) -> list[tuple[int, int]]:
    """The first row and the end of every scale."""
    ends = list(accumulate(lens))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def prefix_calls(inputs: Inputs) -> Call:
    """One plain attention call per scale over its prefix: exact, without a mask, and nothing invisible is computed."""
    spans = _spans(inputs.lens)

    def attention(q, k, v):
        parts = [F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :end], v[:, :, :end])
                 for start, end in spans]  # fmt: skip
        return torch.cat(parts, dim=2)

    return timed(attention, inputs)


@only_on("cuda")
def flash_attn_prefix_calls(inputs: Inputs) -> Call:
    """The same calls with the flash-attn package, whose layout is (B, L, H, D). It has fp16 and bf16 only."""
    from flash_attn import flash_attn_func

    spans = _spans(inputs.lens)

    def attention(q, k, v):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        parts = [flash_attn_func(q[:, start:end], k[:, :end], v[:, :end]) for start, end in spans]
        return torch.cat(parts, dim=1).transpose(1, 2)

    return timed(attention, inputs)


def composition(inputs: Inputs):
    """Matrix product, mask, softmax, matrix product."""

    def attention(q, k, v):
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        if inputs.visible is not None:
            scores = scores.masked_fill(~inputs.visible, -torch.inf)
        return scores.softmax(dim=-1) @ v

    return attention


def eager(inputs: Inputs) -> Call:
    return timed(composition(inputs), inputs)


@compiled
def torch_compile(inputs: Inputs) -> Call:
    return timed(torch.compile(composition(inputs), dynamic=False), inputs)


@compiled
def flex(inputs: Inputs) -> Call:
    device = inputs.q.device
    scale = torch.repeat_interleave(torch.arange(len(inputs.lens)), torch.tensor(inputs.lens)).to(device)
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    offset = keys - queries
    block_mask = create_block_mask(
        lambda b, h, i, j: scale[i + offset] >= scale[j], None, None, queries, keys, device=device
    )
    attention = torch.compile(flex_attention, dynamic=False)
    return timed(lambda q, k, v: attention(q, k, v, block_mask=block_mask), inputs)


_OURS = our_providers(ours, "block_causal_attention")
PROVIDERS = {
    **_OURS,
    "masked SDPA, bool": sdpa_bool,
    "masked SDPA, additive": sdpa_additive,
    "K prefix SDPA calls": prefix_calls,
    "K prefix flash-attn calls": flash_attn_prefix_calls,
    "eager composition": eager,
    "torch.compile of it": torch_compile,
    "FlexAttention, compiled": flex,
}
STEP_PROVIDERS = {
    **_OURS,
    "SDPA": sdpa_bool,
    "eager composition": eager,
    "torch.compile of it": torch_compile,
    "FlexAttention, compiled": flex,
}
# The eager composition has an (L, L) tensor for each head, which takes several gigabytes at 1024 px.
LONG_PROVIDERS = {name: PROVIDERS[name] for name in (*_OURS, "masked SDPA, bool", "K prefix SDPA calls")}
LONG_MISSING = {name: "left out at this length" for name, provider in PROVIDERS.items()
                if name not in LONG_PROVIDERS and not hasattr(provider, "device")}  # fmt: skip


def recomputed(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Forward and backward by matrix products that recompute the probabilities as exp(scores - lse), in fp32 or fp64.

    Every backward without an (L, L) tensor uses this formula. Rounding the scores and lse, which are about 10, loses
    several times as much accuracy as rounding a saved softmax. The error of a kernel is therefore compared with that of
    this formula, not with that of a backward that keeps the softmax.
    """
    q, k, v, dout = (t.detach().to(torch.promote_types(t.dtype, torch.float32))
                     for t in (inputs.q, inputs.k, inputs.v, inputs.dout))  # fmt: skip
    scale = q.shape[-1] ** -0.5
    scores = q @ k.mT * scale
    if inputs.visible is not None:
        scores = scores.masked_fill(~inputs.visible, -torch.inf)
    p = torch.exp(scores - scores.logsumexp(dim=-1, keepdim=True))
    out = (p @ v).to(inputs.q.dtype).to(p.dtype)  # a backward gets the rounded output
    ds = p * (dout @ v.mT - (dout * out).sum(dim=-1, keepdim=True)) * scale
    return tuple(t.to(inputs.q.dtype) for t in (out, ds @ k, ds.mT @ q, p.mT @ dout))


def judge(inputs: Inputs) -> Judge:
    names = ("out",) if inputs.dout is None else ("out", "dq", "dk", "dv")

    def results(inputs: Inputs, dtype) -> dict[str, torch.Tensor]:
        q, k, v = (t.detach().to(dtype) for t in (inputs.q, inputs.k, inputs.v))
        dout = None if inputs.dout is None else inputs.dout.to(dtype)
        converted = inputs._replace(q=q, k=k, v=v, dout=dout)
        found = (sdpa_bool(converted)(),) if dout is None else recomputed(converted)
        return dict(zip(names, found, strict=True))

    exact = results(inputs, torch.float64)
    with stated_order():
        # For gradients all heads are computed, because heads differ in which rows of dq and dk cancel.
        if inputs.dout is not None:
            return judge_floats(exact, results(inputs, inputs.q.dtype))
        # For outputs at most 1024 queries of one head are enough. They are on the CPU, where attention has a stated
        # order.
        some = slice(1), slice(1), slice(None, None, -(-inputs.q.shape[2] // 1024))
        visible = None if inputs.visible is None else inputs.visible[some[2]].cpu()
        k, v = (t[:1, :1].cpu() for t in (inputs.k, inputs.v))
        part = results(Inputs(inputs.q[some].cpu(), k, v, inputs.lens, visible, None), inputs.q.dtype)["out"]
    return judge_floats(exact, {"out": plain_part(exact["out"], part, *some)})


def case(tier, lens, dtype, *, batch=2, heads=16, head_dim=64, backward=False, queries=None, **options) -> Case:
    pairs = sum(length * end for length, end in zip(lens, accumulate(lens), strict=True))
    if queries is not None:
        pairs = queries * sum(lens)
    # The forward has two products; the backward has five, one of which recomputes the scores.
    flops = 2 * pairs * batch * heads * head_dim * (7 if backward else 2)
    length = f"L{sum(lens)}" if queries is None else f"Lq{queries} of Lk{sum(lens)}"
    providers = PROVIDERS if queries is None else STEP_PROVIDERS
    return Case(
        group="block_causal_attention " + ("forward+backward" if backward else "forward"),
        name=f"B{batch} H{heads} D{head_dim} {length} {str(dtype).removeprefix('torch.')}",
        tier=tier,
        inputs=functools.partial(make_inputs, batch, heads, head_dim, lens, dtype, backward, queries),
        judge=judge,
        work=Work(flops, "FLOP", "bf16" if dtype == torch.bfloat16 else "fp32"),
        op="block_causal_attention",
        **{"providers": providers, "baseline": "masked SDPA, bool" if queries is None else "SDPA", **options},
    )


_EMBEDDED, _256, _512, _1024 = (scale_lens(name) for name in ("embedded", "256px", "512px", "1024px"))
_INFINITY = scale_lens("infinity-512px")
_FP32, _BF16 = torch.float32, torch.bfloat16
_GPU, _BOTH = ("cuda",), ("cpu", "cuda")
CASES = (
    case("smoke", _EMBEDDED, _FP32, heads=2, headline=True, devices=_BOTH),
    case("smoke", _EMBEDDED, _BF16, heads=2, backward=True, devices=_BOTH),
    case("quick", _256, _FP32, headline=True),
    case("quick", _256, _BF16, headline=True),
    case("quick", _256, _FP32, backward=True, headline=True),
    case("quick", _256, _BF16, backward=True, headline=True),
    case("quick", _256, _FP32, queries=256),
    case("quick", _256, _BF16, queries=256),
    case("full", _512, _FP32),
    case("full", _512, _BF16),
    case("full", _512, _FP32, backward=True),
    case("full", _512, _BF16, backward=True),
    case("full", _1024, _BF16, batch=1, heads=8, providers=LONG_PROVIDERS, missing=LONG_MISSING),
    case("quick", _256, _BF16, batch=16, devices=_GPU),
    case("quick", _256, _BF16, batch=16, backward=True, devices=_GPU),
    case("quick", _256, _FP32, batch=16, devices=_GPU),
    case("quick", _256, _BF16, batch=16, queries=256, devices=_GPU),
    case("quick", _512, _BF16, batch=4, heads=36, devices=_GPU),
    case("quick", _512, _BF16, batch=4, heads=36, backward=True, devices=_GPU),
    case("full", _INFINITY, _BF16, batch=2, head_dim=128, devices=_GPU),
    case("full", _INFINITY, _BF16, batch=2, head_dim=128, backward=True, devices=_GPU),
    case("full", _1024, _BF16, batch=2, heads=16, providers=LONG_PROVIDERS, missing=LONG_MISSING, devices=_GPU),
)


def test_block_causal_attention(duel):
    duel()
