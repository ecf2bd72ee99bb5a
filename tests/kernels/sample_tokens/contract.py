"""Inputs of sampling for the tests of every backend: options, noise, logits with ties, logits that are not finite."""

import torch

from var_kernels.testing import randn

# (top_k, top_p)
OPTIONS = [(0, 0.0), (1, 0.0), (7, 0.0), (0, 0.3), (0, 0.96), (50, 0.9), (0, 1.0), (0, 1e-9), (900, 0.96), (5000, 0.5)]


def noise_of(shape, seed):
    return torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(seed))


def tied_logits(shape):
    """Logits of five values, so that ties are everywhere; zeros of both signs, which are equal."""
    logits = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1)).float()
    zeros = (logits == 0).nonzero().T
    logits[tuple(zeros[:, ::2])] = -0.0
    return logits


def noise_for_each_token(vocab):
    """Noise (1, vocab, vocab) with which row i draws token i if sampling keeps it, and another one if not."""
    noise = torch.full((1, vocab, vocab), 1e18)
    noise.diagonal(dim1=1, dim2=2).fill_(1e-18)
    return noise


def assert_top_p_uses_its_budget(op):
    """Tokens are dropped as long as their probabilities add up to at most 1 - top_p, not to a little less or more.

    `op` takes the arguments of `sample_tokens`. The sums exceed the budget, or fall short of it, by 2e-5, which is far
    more than they are rounded by, and less than the smallest probability.
    """
    logits = randn(1, 1, 70, seed=3)
    shares, order = logits.double().softmax(-1).flatten().sort()
    assert shares[0] > 1e-4
    sums = shares.cumsum(0)
    for last in (0, 1, 20, 50, 68):
        for margin, dropped in ((2e-5, last + 1), (-2e-5, last)):
            tokens = op(logits.expand(1, 70, 70), top_p=1 - float(sums[last] + margin), noise=noise_for_each_token(70))
            found = (tokens[0] == torch.arange(70)).nonzero().flatten()
            assert found.tolist() == sorted(order[dropped:].tolist()), (last, margin)


def logits_with_special_values(positions=4):
    """(1, positions, 40): rows of NaN, of -inf, with one finite logit, and with NaN at the even tokens; then others."""
    logits = randn(1, positions, 40, seed=1)
    logits[0, 0] = torch.nan
    logits[0, 1] = -torch.inf
    logits[0, 2, :39] = -torch.inf
    logits[0, 3, ::2] = torch.nan
    return logits
