"""Samples one token for each row of logits: guidance, top-k, top-p and the draw, without sorting.

A program holds a row in registers. fp32 numbers are mapped to integers of the same order (`_keys`), and both thresholds
are found by bisection over keys. Each step counts tokens, or adds up probabilities, in one reduction over the row;
there are at most 32 steps. The latency of the reductions is the limit. There are many rows (B·l_k), so a multiprocessor
has several to switch between.

The row is arranged in blocks of 64 tokens, (BLOCKS, 4, 16). The four words that one Philox counter gives belong to
tokens that are sixteen apart, so a tile (BLOCKS, 16) of counters gives the noise of the whole row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .configs import choose
from .launch import launch
from .targets import target_of

_LOWEST = tl.constexpr(-(2**31))
_MINUS_INFINITY = tl.constexpr(-2139095041)  # the key of -inf
_HIGHEST = tl.constexpr(2**31 - 1)
MOST_TOKENS = 32768  # a row has to fit the registers of a program


@triton.jit
def _keys(x):
    """Integers in the order of the floats, which must not be -0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(tl.sum(x, axis=2), axis=1), axis=0)


@triton.jit
def _max(x):
    return tl.max(tl.max(tl.max(x, axis=2), axis=1), axis=0)


@triton.jit
def _min(x):
    return tl.min(tl.min(tl.min(x, axis=2), axis=1), axis=0)


@triton.jit
def _middle(low, high):
    return ((low.to(tl.int64) + high + 1) >> 1).to(tl.int32)


@triton.jit
def _top_k_key(keys, k, high):
    """The key that exactly k tokens reach, or more if several tokens equal the k-th."""
    low = tl.full((), _MINUS_INFINITY, tl.int32)
    while low < high:  # at least k reach `low`, fewer than k exceed `high`
        middle = _middle(low, high)
        count = _sum((keys >= middle).to(tl.int32))
        if count >= k:
            low = middle
        if count < k:
            high = middle - 1
        if count == k:
            high = middle
    return low


@triton.jit
def _top_p_key(keys, probabilities, budget, low, high):
    """The smallest key that stays. The tokens below it fit in the budget; those with it do not, or it is the largest
    key."""
    low -= 1
    high -= 1
    while low < high:
        middle = _middle(low, high)
        if _sum(tl.where(keys <= middle, probabilities, 0.0)) <= budget:
            low = middle
        else:
            high = middle - 1
    return _min(tl.where(keys > low, keys, _HIGHEST))


@triton.jit
def _philox(seed, position, counters):
    """The four random words of the counters (counters, position, 0, 0), after ten rounds keyed by the seed."""
    x0 = counters.to(tl.uint32)
    x1 = tl.zeros_like(x0) + position.to(tl.uint32)
    x2 = tl.zeros_like(x0)
    x3 = tl.zeros_like(x0)
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        product0 = x0.to(tl.uint64) * 0xD2511F53
        product1 = x2.to(tl.uint64) * 0xCD9E8D57
        x0 = (product1 >> 32).to(tl.uint32) ^ x1 ^ key0
        x2 = (product0 >> 32).to(tl.uint32) ^ x3 ^ key1
        x1 = product1.to(tl.uint32)
        x3 = product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return x0, x1, x2, x3


@triton.jit
def _exponential(word):
    """-log(1 - u) for u = (word + 1/2) / 2^32, exact to rounding for small u too, which the hardware's logarithm is
    not.

    With 1 - u = 2^e · m and m in [1/√2, √2), it is e·log 2 + 2·artanh((m - 1)/(m + 1)), times u / (1 - (1 - u)) to
    correct the rounding of 1 - u.
    """
    u = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    rest = 1.0 - u
    bits = rest.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (bits >> 23).to(tl.float32)
    mantissa = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = square * 0.2222222222 + 0.2857142857
    series = series * square + 0.4
    series = series * square + 0.6666666667
    series = series * square + 2.0
    logarithm = exponent * 0.693147180559945309 + s * series
    safe = tl.where(rest == 1.0, 0.5, rest)
    noise = tl.where(rest == 1.0, u, logarithm * u / (safe - 1.0))
    return tl.where(rest <= 0.0, float("inf"), noise)


@triton.jit
def _noise_of(seed, position, BLOCKS: tl.constexpr):
    """The noise of a row, (BLOCKS, 4, 16)."""
    counters = tl.arange(0, BLOCKS)[:, None, None] * 16 + tl.arange(0, 16)[None, None, :]
    x0, x1, x2, x3 = _philox(seed, position, counters)
    word = tl.arange(0, 4)[None, :, None]
    return _exponential(tl.where(word < 2, tl.where(word == 0, x0, x1), tl.where(word == 2, x2, x3)))


@triton.jit
def _drop_first_ties(keys, index, border, budget, probabilities, tokens):
    """Gives the first tokens with key `border` a key below every other, as many of them as the budget still allows."""
    tied = keys == border
    equal = _sum(tied.to(tl.int32))
    if equal > 1:
        left = budget - _sum(tl.where(keys < border, probabilities, 0.0))
        each = _max(tl.where(tied, probabilities, 0.0))
        count = tl.minimum(tl.floor(left / each).to(tl.int32), equal - 1)
        low = tl.zeros((), tl.int32)
        high = tl.zeros((), tl.int32) + tokens
        while low < high:  # `low` tokens hold at most `count` ties, more than `high` hold more
            middle = _middle(low, high)
            if _sum((tied & (index < middle)).to(tl.int32)) <= count:
                low = middle
            else:
                high = middle - 1
        keys = tl.where(tied & (index < low), _LOWEST, keys)
    return keys


@triton.jit(do_not_specialize=["length", "vocab", "top_k", "offset"])
def sample_row(
    conditional, unconditional, noise, seeds, tokens, conditional_b, conditional_l, unconditional_b, unconditional_l,
    length, vocab, guidance, top_k, dropped, offset,
    GUIDED: tl.constexpr, TOP_P: tl.constexpr, SEEDED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // length, row % length
    word = tl.arange(0, 4)[None, :, None]
    index = tl.arange(0, BLOCKS)[:, None, None] * 64 + word * 16 + tl.arange(0, 16)[None, None, :]
    mask = index < vocab
    place = conditional + sample * conditional_b + token * conditional_l
    logits = tl.load(place + index, mask=mask, other=float("-inf")).to(tl.float32)
    if GUIDED:
        place = unconditional + sample * unconditional_b + token * unconditional_l
        other = tl.load(place + index, mask=mask, other=0.0).to(tl.float32)
        logits = (1.0 + guidance) * logits - guidance * other
    logits = tl.where(mask & (logits == logits), logits, float("-inf"))
    logits = tl.where(logits == 0.0, 0.0, logits)  # turns -0 into 0, whose key is different
    keys = _keys(logits)
    highest = _max(keys)
    largest = _max(logits)
    threshold = tl.full((), _MINUS_INFINITY + 1, tl.int32)
    if top_k > 0:
        threshold = tl.maximum(threshold, _top_k_key(keys, top_k, highest))
    kept = keys >= threshold
    distance = tl.where(kept, logits - largest, float("-inf"))
    probabilities = tl.where(kept, tl.exp2(distance * 1.44269504088896341), 0.0)
    if TOP_P:
        budget = dropped * _sum(probabilities)
        threshold = _top_p_key(keys, probabilities, budget, threshold, highest)
        keys = _drop_first_ties(keys, index, threshold, budget, probabilities, vocab)
        kept = keys >= threshold
    if SEEDED:
        drawn = _noise_of(tl.load(seeds + sample), offset + token, BLOCKS)
    else:
        drawn = tl.load(noise + row * vocab + index, mask=mask, other=1.0)
    scores = probabilities / drawn
    kept = kept & (scores == scores)
    best = _max(tl.where(kept, scores, -1.0))
    winner = _min(tl.where(kept & (scores == best), index, _HIGHEST))
    tl.store(tokens + row, tl.where((best >= 0.0) & (largest > float("-inf")), winner, 0).to(tl.int64))


def _dense_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] <= 1 else tensor.contiguous()


def sample_tokens(
    conditional: torch.Tensor, unconditional: torch.Tensor | None, guidance: float, top_k: int, top_p: float,
    noise: torch.Tensor | None, seeds: torch.Tensor | None, offset: int,
) -> torch.Tensor:
    """The raw operator `_sample_tokens`: int64 (B, L)."""
    batch, length, vocab = conditional.shape
    if vocab > MOST_TOKENS:
        raise ValueError(f"conditional: expected at most {MOST_TOKENS} tokens to choose from in Triton, got {vocab}")
    tokens = conditional.new_empty(batch, length, dtype=torch.int64)
    if tokens.numel() == 0:
        return tokens
    conditional = _dense_last(conditional)
    unconditional = None if unconditional is None else _dense_last(unconditional)
    blocks = triton.next_power_of_2(triton.cdiv(vocab, 64))
    config = choose("sample_tokens.sample_row", target_of(conditional.device), 64 * blocks, 4)
    other = conditional if unconditional is None else unconditional
    arguments = {
        "conditional": conditional, "unconditional": unconditional,
        "noise": None if noise is None else noise.contiguous(), "seeds": None if seeds is None else seeds.contiguous(),
        "tokens": tokens, "conditional_b": conditional.stride(0), "conditional_l": conditional.stride(1),
        "unconditional_b": other.stride(0), "unconditional_l": other.stride(1), "length": length, "vocab": vocab,
        "guidance": float(guidance), "top_k": top_k if top_k < vocab else 0, "dropped": 1.0 - float(top_p),
        "offset": offset, "GUIDED": unconditional is not None, "TOP_P": top_p > 0, "SEEDED": seeds is not None,
        "BLOCKS": blocks,
    }  # fmt: skip
    launch(sample_row, (batch * length,), arguments, config)
    return tokens
