"""Trains modules of vector-quantize-pytorch before and after the swap, and compares all that they compute."""

import copy

import pytest
import torch

from var_kernels import swap

package = pytest.importorskip("vector_quantize_pytorch")
VectorQuantize, ResidualVQ = package.VectorQuantize, package.ResidualVQ

DIM, CODES, STEPS = 8, 24, 4
SHAPE = (2, 30, DIM)


def swapped_copy(module):
    """A copy of the module that is swapped, and the report."""
    ours = copy.deepcopy(module)
    return ours, swap.apply(ours, strict=True)


def train(module, shape=SHAPE, dtype=torch.float32, steps=STEPS, scale=1.0, seed=3, **options):
    """Of each step the outputs with the gradient of the input, and those of parameters; then the state at the end, and
    the next random number."""
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([*module.parameters(), torch.nn.Parameter(torch.zeros(()))], lr=0.1)
    results = []
    for _ in range(steps):
        x = (torch.randn(shape) * scale).to(dtype).requires_grad_()
        quantized, indices, loss, *others = module(x, **options)
        total = (quantized.float() - 0.5).square().mean() + loss.sum()
        optimizer.zero_grad()
        if total.requires_grad:
            total.backward()
        outputs = [quantized, indices, loss, *others, *([] if x.grad is None else [x.grad])]
        results.append((outputs, [p.grad.clone() for p in module.parameters() if p.grad is not None]))
        if module.training:
            optimizer.step()
    return results, module.state_dict(), torch.rand(())


def assert_same(found, expected, terms):
    """Integers are equal. Sums of `terms` floats in another order differ by the rounding of each addition.

    It is that of fp32, or of a dtype that rounds more: the package computes in fp32.
    """
    assert found.shape == expected.shape and found.dtype == expected.dtype
    if not found.dtype.is_floating_point:
        assert torch.equal(found, expected)
    else:
        eps = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
        bound = terms * eps * expected.abs().max() if expected.numel() else 0
        assert (found - expected).abs().le(bound).all(), (found - expected).abs().max() / bound * terms


def train_with_clear_choices(module, **options):
    """A seed, and the results of a training with it in which no choice of a code depends on the rounding of distances.

    Else the original itself would choose another code on another machine. Equal codes are a clear choice: the first.
    """
    for seed in range(20):
        trained, gaps = copy.deepcopy(module), []

        def look(codebook, args, output, gaps=gaps):
            distances = output[2].detach()
            if distances.shape[-1] > 1 and distances.numel():
                gap = torch.sub(*distances.topk(2, dim=-1).values.unbind(-1))
                gaps.append(((gap == 0) | (gap > 4e-6 * distances.abs().max())).all())

        for codebook in {layer._codebook for layer in trained.modules() if hasattr(layer, "_codebook")}:
            codebook.register_forward_hook(look)
        results = train(trained, seed=seed, **options)
        if all(gaps):
            return seed, results
    raise AssertionError("no seed with clear choices")


def assert_trains_alike(module, served=True, terms=4 * SHAPE[1], **options):
    """Both trainings give the same. The first codes, which depend on no sum, are the same bit by bit."""
    seed, expected = train_with_clear_choices(module, **options)
    ours, report = swapped_copy(module)
    found = train(ours, seed=seed, **options)
    for ours_of_step, theirs_of_step in zip(found[0], expected[0], strict=True):
        for a, b in zip(sum(ours_of_step, []), sum(theirs_of_step, []), strict=True):
            assert_same(a, b, terms)
    if getattr(module, "in_place_codebook_optimizer", None) is None:
        assert torch.equal(found[0][0][0][0], expected[0][0][0][0])
    assert found[1].keys() == expected[1].keys()
    for name, value in found[1].items():
        assert_same(value, expected[1][name], terms)
    assert torch.equal(found[2], expected[2])  # the generator is in the same state
    assert bool(report.left_to_the_original) != served, report
    return report


def make(cls=VectorQuantize, **options):
    torch.manual_seed(1)
    return cls(**{"dim": DIM, "codebook_size": CODES} | options)
