"""The Triton kernel of sample_tokens, interpreted and as compiled for sm_80."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.sample_tokens.contract import (
    OPTIONS,
    assert_top_p_uses_its_budget,
    logits_with_special_values,
    noise_for_each_token,
    noise_of,
    tied_logits,
)
from tools.gpu_emulation.triton import executing, interpret, run_ptx
from var_kernels import sample_tokens
from var_kernels.reference.sample_tokens import restrict
from var_kernels.testing import randn


def both(function, conditional, unconditional=None, **options):
    """The tokens of the Triton kernel and those of the reference."""
    with executing(function):
        found = sample_tokens(conditional, unconditional, **options, backend="triton")
    return found, sample_tokens(conditional, unconditional, **options, backend="reference")


@pytest.mark.parametrize("vocab", [1, 2, 17, 64, 65, 200])
def test_interpreted(vocab):
    conditional, unconditional = (4 * randn(2, 2, vocab, seed=seed) for seed in (vocab, vocab + 1))
    for seed, (top_k, top_p) in enumerate(OPTIONS):
        options = {"guidance": 1.2 * (seed % 2), "top_k": top_k, "top_p": top_p}
        found, expected = both(
            interpret, conditional, unconditional, noise=noise_of(conditional.shape, seed), **options
        )
        assert torch.equal(found, expected), (top_k, top_p)


def test_seeds_stand_for_the_documented_noise():
    seeds = torch.tensor([0, -1, 0x123456789ABCDEF])
    for vocab in (3, 64, 150):
        found, expected = both(interpret, 2 * randn(3, 2, vocab, seed=1), seeds=seeds, offset=5)
        assert torch.equal(found, expected)


def test_equal_logits_on_the_border():
    """top-k keeps all ties, and top-p drops those with the lowest indices first."""
    logits, noise = tied_logits((1, 1, 20)), noise_for_each_token(20)
    rows = logits.expand(1, 20, 20)
    for top_k, top_p in ((7, 0.0), (0, 0.3), (15, 0.9), (0, 1e-9)):
        found, _ = both(interpret, rows, top_k=top_k, top_p=top_p, noise=noise)
        assert torch.equal(found[0] == torch.arange(20), restrict(logits.double(), top_k, top_p)[0, 0].isfinite())


def test_top_p_uses_its_budget():
    with executing(interpret):
        assert_top_p_uses_its_budget(functools.partial(sample_tokens, backend="triton"))


def test_nan_and_infinite_logits():
    logits = logits_with_special_values()
    for top_k, top_p in ((0, 0.0), (1, 0.0), (7, 0.5), (0, 0.9)):
        found, expected = both(interpret, logits, top_k=top_k, top_p=top_p, noise=noise_of(logits.shape, 2))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled(dtype):
    conditional, unconditional = (4 * randn(1, 2, 150, seed=seed, dtype=dtype) for seed in (1, 2))
    for options in (
        {"guidance": 1.5, "top_k": 40, "top_p": 0.9, "seeds": torch.tensor([77]), "offset": 3},
        {"guidance": 1.5, "top_p": 0.5, "noise": noise_of((1, 2, 150), 1)},
    ):
        found, expected = both(run_ptx, conditional, unconditional, **options)
        assert torch.equal(found, expected)


def test_too_large_a_vocabulary_is_refused():
    with executing(interpret), pytest.raises(ValueError, match="at most 32768 tokens"):
        sample_tokens(torch.zeros(1, 1, 32769), seeds=torch.zeros(1, dtype=torch.int64), backend="triton")
