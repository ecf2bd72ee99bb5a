"""The small ops of a sampling step: unit queries and keys into the KV cache, and tokens from logits."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from var_kernels import qk_norm_cache, sample_tokens
from var_kernels.testing import randn, stated_order

from .harness import Call, Case, Judge, compiled, judge_floats, our_providers
from .plain_var import restrict
from .table import Work

_BYTES = {torch.float32: 4, torch.bfloat16: 2}
_START = 424  # the rows of the cache before the last scale of VAR at 256 px

# ---- qk_norm_cache ---------------------------------------------------------------------------------------------------


class Packed(NamedTuple):
    """qkv (B, L, 3, H, D), the factor of each head, the caches (B, H, L_max, D)."""

    qkv: torch.Tensor
    q_factor: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def packed(batch, heads, length, dim, dtype) -> Packed:
    caches = [torch.zeros(batch, heads, _START + length, dim, dtype=dtype) for _ in range(2)]
    return Packed(randn(batch, length, 3, heads, dim, seed=0, dtype=dtype), randn(heads, seed=1).exp(), *caches)


def by_calls(qkv, q_factor, k_cache, v_cache):
    """The framework calls that the op replaces."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q = (normalize(q.float(), dim=-1) * q_factor.view(-1, 1, 1)).to(v.dtype)
    k_cache[:, :, _START:] = normalize(k.float(), dim=-1).to(v.dtype)
    v_cache[:, :, _START:] = v
    return q, k_cache, v_cache


def _ours(inputs: Packed, backend: str) -> Call:
    qkv, q_factor, k_cache, v_cache = inputs
    return torch.no_grad()(lambda: (
        qk_norm_cache(qkv, k_cache, v_cache, _START, q_factor=q_factor, backend=backend), k_cache, v_cache
    ))  # fmt: skip


def _eager(inputs: Packed) -> Call:
    return torch.no_grad()(lambda: by_calls(*inputs))


@compiled
def _compiled(inputs: Packed) -> Call:
    function = torch.compile(by_calls, dynamic=False)
    return torch.no_grad()(lambda: function(*inputs))


def _judge_packed(inputs: Packed) -> Judge:
    def results(dtype):
        qkv, q_factor, k_cache, v_cache = inputs
        q, k, v = qkv.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)
        made = [normalize(q, dim=-1) * q_factor.to(dtype).view(-1, 1, 1), normalize(k, dim=-1), v]
        caches = [torch.cat((cache[:, :, :_START].to(dtype), rows), dim=2)
                  for cache, rows in zip((k_cache, v_cache), made[1:], strict=True)]  # fmt: skip
        return dict(zip(("q", "k_cache", "v_cache"), (made[0], *caches), strict=True))

    with stated_order():
        plain = {name: tensor.to(inputs.qkv.dtype) for name, tensor in results(torch.float32).items()}
    return judge_floats(results(torch.float64), plain)


def packed_case(tier, batch, heads, length, dim, dtype, **options) -> Case:
    return Case(
        group="qk_norm_cache",
        name=f"B{batch} H{heads} L{length} D{dim} {str(dtype).removeprefix('torch.')}",
        tier=tier,
        inputs=functools.partial(packed, batch, heads, length, dim, dtype),
        providers={**our_providers(_ours, "qk_norm_cache"), "eager": _eager, "torch.compile": _compiled},
        baseline="eager",
        judge=_judge_packed,
        work=Work(6 * batch * heads * length * dim * _BYTES[dtype], "B", "copy"),
        op="qk_norm_cache",
        **options,
    )


# ---- sample_tokens ---------------------------------------------------------------------------------------------------

_TOP_K, _TOP_P, _GUIDANCE = 900, 0.96, 1.5


class Logits(NamedTuple):
    """conditional and unconditional (B, L, V), and the noise of the draw."""

    conditional: torch.Tensor
    unconditional: torch.Tensor
    noise: torch.Tensor


def logits(batch, length, vocab) -> Logits:
    noise = torch.empty(batch, length, vocab).exponential_(generator=torch.Generator().manual_seed(2))
    return Logits(*(3 * randn(batch, length, vocab, seed=seed) for seed in (0, 1)), noise)


def by_sorting(conditional, unconditional, noise):
    """Guidance, topk, sort, cumsum, scatter, softmax, and the draw by the given noise."""
    guided = (1 + _GUIDANCE) * conditional - _GUIDANCE * unconditional
    return (restrict(guided, _TOP_K, _TOP_P).softmax(dim=-1) / noise).argmax(dim=-1)


def _sample(inputs: Logits, backend: str) -> Call:
    conditional, unconditional, noise = inputs
    options = {"guidance": _GUIDANCE, "top_k": _TOP_K, "top_p": _TOP_P, "noise": noise, "backend": backend}
    return lambda: sample_tokens(conditional, unconditional, **options)


def _sorting(inputs: Logits) -> Call:
    return torch.no_grad()(lambda: by_sorting(*inputs))


@compiled
def _compiled_sorting(inputs: Logits) -> Call:
    function = torch.compile(by_sorting, dynamic=False)
    return torch.no_grad()(lambda: function(*inputs))


def _judge_tokens(inputs: Logits) -> Judge:
    """Requires the tokens of float64, except for draws between scores that are equal to 1e-5."""
    conditional, unconditional, noise = (tensor.double() for tensor in inputs)
    guided = (1 + _GUIDANCE) * conditional - _GUIDANCE * unconditional
    scores = restrict(guided, _TOP_K, _TOP_P).softmax(dim=-1) / noise
    best, tokens = scores.max(dim=-1)

    def judge(found: torch.Tensor, peer: bool = False) -> float:
        if found.shape != tokens.shape or found.dtype != torch.int64:
            raise AssertionError(f"tokens: expected int64 of shape {tuple(tokens.shape)}, got {found.dtype} of shape "
                                 f"{tuple(found.shape)}")  # fmt: skip
        if found.min() < 0 or found.max() >= scores.shape[-1]:
            raise AssertionError(f"tokens: expected 0 to {scores.shape[-1] - 1}, got {found.min()} to {found.max()}")
        short = float((1 - scores.gather(-1, found.unsqueeze(-1)).squeeze(-1) / best).max())
        if short > 1e-5:
            wrong = int((found != tokens).sum())
            raise AssertionError(
                f"tokens: {wrong} of {tokens.numel()} differ from float64, by up to {short:.1e} of a score"
            )
        return short

    return judge


def sample_case(tier, batch, length, vocab, **options) -> Case:
    return Case(
        group="sample_tokens",
        name=f"B{batch} L{length} V{vocab} guided top_k 900 top_p 0.96 float32",
        tier=tier,
        inputs=functools.partial(logits, batch, length, vocab),
        providers={
            **our_providers(_sample, "sample_tokens"), "topk and sort": _sorting,
            "torch.compile of it": _compiled_sorting,
        },  # fmt: skip
        baseline="topk and sort",
        judge=_judge_tokens,
        work=Work(3 * batch * length * vocab * 4, "B", "copy"),
        op="sample_tokens",
        **options,
    )


CASES = (
    packed_case("smoke", 2, 4, 9, 64, torch.float32, devices=("cpu", "cuda")),
    packed_case("quick", 2, 16, 256, 64, torch.float32, devices=("cpu", "cuda")),
    packed_case("quick", 2, 16, 256, 64, torch.bfloat16, devices=("cpu", "cuda")),
    packed_case("full", 16, 16, 256, 64, torch.bfloat16, devices=("cpu", "cuda")),
    sample_case("smoke", 2, 4, 1000, devices=("cpu", "cuda")),
    sample_case("quick", 1, 256, 4096, devices=("cpu", "cuda")),
    sample_case("full", 8, 256, 4096, devices=("cpu", "cuda")),
)


def test_sampling(duel):
    duel()
