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
    logits[logits == 0] *= -1
    return logits


def noise_for_each_token(vocab):
    """Noise (1, vocab, vocab) with which row i draws token i if sampling keeps it, and another one if not."""
    noise = torch.full((1, vocab, vocab), 1e18)
    noise.diagonal(dim1=1, dim2=2).fill_(1e-18)
    return noise


def logits_with_special_values(positions=4):
    """(1, positions, 40): rows of NaN, of -inf, with one finite logit, and with NaN at the even tokens; then others."""
    logits = randn(1, positions, 40, seed=1)
    logits[0, 0] = torch.nan
    logits[0, 1] = -torch.inf
    logits[0, 2, :39] = -torch.inf
    logits[0, 3, ::2] = torch.nan
    return logits
