"""sample_tokens on the CPU: the tokens it keeps (as in a sorted list), draws (as in torch.multinomial), seeds."""

import functools

import pytest
import torch

from tests.kernels.sample_tokens.contract import (
    OPTIONS,
    assert_top_p_uses_its_budget,
    logits_with_special_values,
    noise_for_each_token,
    noise_of,
    tied_logits,
)
from var_kernels import sample_tokens
from var_kernels.reference.sample_tokens import exponential, guide, philox, restrict
from var_kernels.testing import randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Vocabularies on both sides of the vector widths and of the blocks of 64.
VOCABULARIES = (1, 2, 15, 16, 17, 63, 64, 65, 100, 1000, 4096)


def chosen_by(noise_seed, conditional, *arguments, **options):
    return sample_tokens(conditional, *arguments, noise=noise_of(conditional.shape, noise_seed), **options)


def kept(logits, top_k, top_p):
    """Which tokens can be drawn: each in turn gets nearly no noise, so that it is drawn if it is kept."""
    batch, length, vocab = logits.shape
    rows = logits.reshape(-1, 1, vocab).repeat_interleave(vocab, dim=0)
    noise = noise_for_each_token(vocab).repeat(batch * length, 1, 1).view_as(rows)
    winners = sample_tokens(rows, top_k=top_k, top_p=top_p, noise=noise).view(-1, vocab)
    return (winners == torch.arange(vocab)).view(batch, length, vocab)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [v for v in VOCABULARIES if v <= 100])
def test_the_kept_tokens_are_those_of_the_sorted_definition(vocab, options):
    logits = 3 * randn(2, 3, vocab, seed=vocab)
    found = kept(logits, *options)
    wide = logits.double()
    expected = restrict(wide, *options).isfinite()
    # Rounding may decide only at the border of top-p: within 1e-6 of the budget, both answers are right.
    shares = wide.softmax(-1) if not 0 < options[0] < vocab else restrict(wide, options[0], 0).softmax(-1)
    below = (shares.unsqueeze(-1) * (wide.unsqueeze(-1) <= wide.unsqueeze(-2))).sum(-2)
    unsure = (below - (1 - options[1])).abs() < 1e-6
    assert torch.equal(found | unsure, expected | unsure)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_logits_on_the_border(options):
    """With few values there are many ties. top-k keeps all, and top-p drops those with the lowest indices first."""
    for vocab in (5, 40, 70):
        logits = tied_logits((3, 2, vocab))
        top_p = options[1]
        expected = restrict(logits.double(), *options).isfinite()
        # A sum that happens to equal the budget would test nothing, so that there must be none.
        ascending = restrict(logits.double(), options[0], 0).softmax(-1).sort(-1).values.cumsum(-1)
        assert top_p in (0, 1) or ((ascending[..., :-1] - (1 - top_p)).abs() > 1e-6).all()
        assert torch.equal(kept(logits, *options), expected)


def test_top_p_uses_its_budget(backend):
    assert_top_p_uses_its_budget(functools.partial(sample_tokens, backend=backend))


@pytest.mark.parametrize("vocab", [20, 100])
def test_of_equal_winners_the_first_is_drawn(backend, vocab):
    logits = torch.zeros(1, 4, vocab)
    for position, first in enumerate((0, 1, 7, 18)):
        logits[0, position, :first] = -1
    tokens = sample_tokens(logits, noise=torch.ones_like(logits), backend=backend)
    assert tokens.tolist() == [[0, 1, 7, 18]]


@pytest.mark.parametrize("guidance", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_draws_what_multinomial_draws(vocab, guidance):
    conditional, unconditional = (4 * randn(2, 9, vocab, seed=seed) for seed in (vocab, vocab + 1))
    for seed, (top_k, top_p) in enumerate(OPTIONS):
        logits = (1 + guidance) * conditional - guidance * unconditional
        probabilities = restrict(logits, top_k, top_p).softmax(-1)
        generator = torch.Generator().manual_seed(seed)
        expected = torch.multinomial(probabilities.view(-1, vocab), 1, replacement=True, generator=generator)
        found = chosen_by(seed, conditional, unconditional, guidance=guidance, top_k=top_k, top_p=top_p)
        assert torch.equal(found, expected.view(2, 9)), (top_k, top_p)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sixteen_bit_logits_are_widened(dtype):
    conditional, unconditional = (4 * randn(2, 5, 300, seed=seed, dtype=dtype) for seed in (1, 2))
    options = {"guidance": 1.2, "top_k": 50, "top_p": 0.9}
    wide = chosen_by(3, conditional.float(), unconditional.float(), **options)
    assert torch.equal(chosen_by(3, conditional, unconditional, **options), wide)


def test_restrict_keeps_top_k_and_top_p():
    logits = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
    assert torch.isfinite(restrict(logits, 2, 0.0)).tolist() == [[[False, False, True, True]]]
    assert torch.isfinite(restrict(logits, 0, 0.5)).tolist() == [[[False, False, False, True]]]
    assert torch.equal(restrict(logits, 0, 0.0), logits)
    assert torch.equal(restrict(logits, 9, 0.0), logits)  # more than the vocabulary, so that all tokens are kept
    assert torch.isfinite(restrict(logits, 0, 1.0)).all()
    assert logits.isfinite().all(), "restrict must not write into its input"


def test_guide_is_linear_extrapolation():
    conditional, unconditional = torch.randn(2, 2, 3, 5).unbind()
    assert torch.equal(guide(conditional, unconditional, 0.0), conditional)
    expected = conditional + 2.0 * (conditional - unconditional)
    torch.testing.assert_close(guide(conditional, unconditional, 2.0), expected)


def test_philox_is_the_published_generator():
    """The numbers are known answers of Random123 for philox4x32-10."""
    zero = torch.tensor(0)
    assert [hex(word) for word in philox(zero, zero, zero)] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_seeds_stand_for_the_documented_noise(vocab):
    logits = 4 * randn(3, 8, vocab, seed=1)
    seeds = torch.tensor([0, -1, 0x123456789ABCDEF])
    found = sample_tokens(logits, top_k=90, seeds=seeds, offset=5)
    assert torch.equal(found, sample_tokens(logits, top_k=90, noise=exponential(seeds, 5, 8, vocab)))
    assert torch.equal(found, sample_tokens(logits, top_k=90, seeds=seeds, offset=5, backend="reference"))


def test_an_image_depends_on_its_own_seed_only():
    logits = 2 * randn(6, 20, 200, seed=1)
    seeds = torch.arange(100, 106)
    everything = sample_tokens(logits, top_p=0.9, seeds=seeds, offset=3)
    assert torch.equal(sample_tokens(logits[4:5], top_p=0.9, seeds=seeds[4:5], offset=3), everything[4:5])
    for position in (0, 7, 19):
        part = sample_tokens(logits[:, position : position + 1], top_p=0.9, seeds=seeds, offset=3 + position)
        assert torch.equal(part[:, 0], everything[:, position])
    assert not torch.equal(sample_tokens(logits, top_p=0.9, seeds=seeds + 1, offset=3), everything)
    assert not torch.equal(sample_tokens(logits, top_p=0.9, seeds=seeds, offset=4), everything)


@functools.cache
def many_draws(top_k, top_p):
    logits = 1.5 * randn(1, 1, 60, seed=5)
    seeds = torch.arange(64)
    drawn = sample_tokens(logits.expand(64, 4000, 60), top_k=top_k, top_p=top_p, seeds=seeds)
    return restrict(logits.double(), top_k, top_p).softmax(-1).flatten(), drawn


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (20, 0.0), (0, 0.8), (30, 0.9)])
def test_seeded_draws_follow_the_distribution(top_k, top_p):
    """A chi-squared test over all tokens, and one over pairs of neighbouring positions, which must be independent."""
    probabilities, drawn = many_draws(top_k, top_p)
    hits = drawn.flatten().bincount(minlength=60).double()
    assert not hits[probabilities == 0].any()
    stays = probabilities > 0
    expected = probabilities[stays] * drawn.numel()
    statistic = ((hits[stays] - expected) ** 2 / expected).sum()
    freedom = int(stays.sum()) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5, "the limit is five standard deviations of chi-squared"
    pairs = (drawn[:, ::2] * 60 + drawn[:, 1::2]).flatten().bincount(minlength=3600).double()
    expected = torch.outer(probabilities, probabilities).flatten() * drawn.numel() / 2
    frequent = expected > 5
    statistic = ((pairs - expected)[frequent] ** 2 / expected[frequent]).sum()
    freedom = int(frequent.sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_strided_logits_and_threads(restore_threads):
    wide = randn(4, 12, 330, seed=1)
    conditional, unconditional = wide[:2, ::2, 5:305], wide[2:, ::2, 30:330]
    options = {"guidance": 1.0, "top_k": 40, "top_p": 0.9}
    want = chosen_by(1, conditional.contiguous(), unconditional.contiguous(), **options)
    assert torch.equal(chosen_by(1, conditional, unconditional, **options), want)
    columns = conditional.mT.contiguous().mT  # rows are not dense
    assert torch.equal(chosen_by(1, columns, unconditional, **options), want)
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        assert torch.equal(chosen_by(1, conditional, unconditional, **options), want)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nan_and_infinite_logits(backend):
    logits = logits_with_special_values(5)
    for top_k, top_p in OPTIONS:
        tokens = chosen_by(2, logits, top_k=top_k, top_p=top_p, backend=backend)[0]
        assert tokens[0] == tokens[1] == 0 and tokens[2] == 39 and tokens[3] % 2 == 1


def test_unconditional_is_not_read_without_guidance():
    conditional = randn(2, 3, 50, seed=1)
    assert torch.equal(chosen_by(1, conditional, torch.full_like(conditional, torch.nan)), chosen_by(1, conditional))


def test_nothing_to_do():
    assert sample_tokens(torch.zeros(0, 3, 5), seeds=torch.zeros(0, dtype=torch.int64)).shape == (0, 3)
    assert sample_tokens(torch.zeros(2, 0, 5), noise=torch.ones(2, 0, 5)).shape == (2, 0)


def test_compile():
    conditional, seeds = randn(2, 3, 50, seed=1), torch.arange(2)
    step = torch.compile(lambda logits, seeds: sample_tokens(logits, top_k=9, seeds=seeds) + 0, fullgraph=True)
    assert torch.equal(step(conditional, seeds), sample_tokens(conditional, top_k=9, seeds=seeds))


def test_opcheck():
    from var_kernels.native import load

    if not load.native_library().available:
        pytest.skip("no native library")
    raw = torch.ops.var_kernels._sample_tokens
    logits = randn(2, 3, 20, seed=1)
    torch.library.opcheck(raw, (logits, logits, 0.5, 3, 0.9, logits.abs() + 0.1, None, 0))
    torch.library.opcheck(raw, (logits, None, 0.0, 0, 0.0, None, torch.arange(2), 7))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"conditional": torch.zeros(2, 3)}, ValueError, "conditional: expected 3 dimensions"),
        ({"conditional": torch.zeros(2, 3, 0), "seeds": torch.arange(2)}, ValueError, "conditional: expected at least"),
        ({"conditional": torch.zeros(2, 3, 4).int()}, TypeError, "conditional: expected float32"),
        ({"unconditional": torch.zeros(2, 3, 5)}, ValueError, "unconditional: expected shape"),
        ({"unconditional": torch.zeros(2, 3, 4).half()}, TypeError, "unconditional: expected torch.float32"),
        ({"guidance": float("inf")}, ValueError, "guidance: expected a finite"),
        ({"guidance": 1.0}, ValueError, "unconditional: expected a tensor where guidance"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_p": 1.5}, ValueError, "top_p"),
        ({"top_p": float("nan")}, ValueError, "top_p"),
        ({"noise": torch.ones(2, 3, 4)}, ValueError, "noise, seeds: expected one of them, got both"),
        ({"seeds": None}, ValueError, "noise, seeds: expected one of them, got neither"),
        ({"seeds": None, "noise": torch.ones(2, 3, 5)}, ValueError, "noise: expected shape"),
        ({"seeds": None, "noise": torch.ones(2, 3, 4).half()}, TypeError, "noise: expected torch.float32"),
        ({"seeds": torch.arange(3)}, ValueError, "seeds: expected shape"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds: expected an int64 tensor"),
        ({"seeds": [1, 2]}, TypeError, "seeds: expected an int64 tensor, got list"),
        ({"offset": -1}, ValueError, "offset"),
        ({"backend": "nonsense"}, ValueError, "backend: expected one of"),
    ],
)  # fmt: skip
def test_bad_input(change, error, match):
    with pytest.raises(error, match=match):
        sample_tokens(**{"conditional": torch.zeros(2, 3, 4), "seeds": torch.arange(2), **change})
