"""Which random numbers the scales of an image draw."""

import pytest
import torch

from tests.helpers.models import tiny_var, tiny_vqvae
from var import Generator
from var_kernels import sample_tokens


@pytest.mark.parametrize("cfg", [0.0, 1.5])
def test_every_scale_draws_random_numbers_of_its_own(cfg):
    """With equal logits, a token depends on its random numbers only: on the seed and the place in the whole sequence.

    All scales would draw the first numbers of the seed if each of them began at position 0.
    """
    model = tiny_var()
    with torch.no_grad():
        model.head.weight.zero_(), model.head.bias.zero_()
    seeds = torch.tensor([5, -1, 1 << 40])
    tokens = Generator(model, tiny_vqvae(), batch_size=3)(torch.tensor([0, 3, 3]), seeds=seeds, cfg=cfg).tokens
    logits = torch.zeros(3, model.config.schedule.length, model.config.vocab_size)
    assert torch.equal(tokens, sample_tokens(logits, seeds=seeds))


def test_every_scale_draws_noise_of_its_own():
    """The same for one seed for all images, whose generator draws one number after the other."""
    model = tiny_var()
    with torch.no_grad():
        model.head.weight.zero_(), model.head.bias.zero_()
    tokens = Generator(model, tiny_vqvae(), batch_size=2)(torch.tensor([0, 3]), seed=7).tokens
    schedule, generator, expected = model.config.schedule, torch.Generator().manual_seed(7), []
    for length in schedule.lengths:
        logits = torch.zeros(2, length, model.config.vocab_size)
        expected.append(sample_tokens(logits, noise=torch.empty_like(logits).exponential_(generator=generator)))
    assert torch.equal(tokens, torch.cat(expected, dim=1))
