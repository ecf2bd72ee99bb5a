"""Tests swapping ResidualVQ and other classes of vector-quantize-pytorch that are made of VectorQuantize."""

import copy
import pickle

import pytest
import torch

from tests.helpers.vector_quantize import (
    CODES,
    DIM,
    SHAPE,
    STEPS,
    ResidualVQ,
    assert_trains_alike,
    make,
    package,
    swapped_copy,
    train,
)

RESIDUAL = {
    "plain": {"num_quantizers": 8},
    "shared": {"num_quantizers": 8, "shared_codebook": True},
    "shared, expiry": {"num_quantizers": 8, "shared_codebook": True, "threshold_ema_dead_code": 2},
    "shared, kmeans, cosine": {
        "num_quantizers": 8, "shared_codebook": True, "kmeans_init": True, "use_cosine_sim": True,
    },
    "expiry": {"num_quantizers": 8, "threshold_ema_dead_code": 2},
    "kmeans": {"num_quantizers": 3, "kmeans_init": True, "kmeans_iters": 3},
    "dropout": {"num_quantizers": 8, "quantize_dropout": True, "quantize_dropout_multiple_of": 2},
    "sizes": {"codebook_size": (24, 12, 3)},
    "projections": {"num_quantizers": 4, "codebook_dim": 4},
    "gradients between layers": {"num_quantizers": 4, "quant_grad_frac": 0.5},
    "diveq": {"num_quantizers": 4, "diveq": True},
    "learnable": {"num_quantizers": 4, "learnable_codebook": True, "ema_update": False},
}  # fmt: skip


@pytest.mark.parametrize("options", RESIDUAL.values(), ids=RESIDUAL)
def test_residual_training(options):
    # Codes that expire in a shared codebook become residuals of all layers, some of which are equal up to rounding.
    steps = 1 if {"shared_codebook", "threshold_ema_dead_code"} <= options.keys() else STEPS
    assert_trains_alike(make(ResidualVQ, **options), terms=16 * SHAPE[1], steps=steps)


@pytest.mark.parametrize("options", RESIDUAL.values(), ids=RESIDUAL)
def test_residual_eval(options):
    module = make(ResidualVQ, **options)
    train(module)
    assert_trains_alike(module.eval(), terms=16 * SHAPE[1], **({"return_all_codes": True} if len(options) < 2 else {}))


def test_residual_masks():
    mask = torch.arange(SHAPE[1]) < torch.tensor([[30], [12]])
    assert_trains_alike(make(ResidualVQ, num_quantizers=3, threshold_ema_dead_code=1), mask=mask)


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_grouped_residual_training(shared):
    module = make(package.GroupedResidualVQ, num_quantizers=4, groups=2, quantize_dropout=True, shared_codebook=shared)
    report = assert_trains_alike(module)
    assert len(report.swapped) == 8


def test_random_projections():
    module = package.RandomProjectionQuantizer(dim=DIM, codebook_size=CODES, codebook_dim=4, num_codebooks=3)
    ours, _ = swapped_copy(module)
    x = torch.randn(SHAPE)
    assert torch.equal(ours(x), module(x))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("options", [{"beam_size": 3}, {"implicit_neural_codebook": True}], ids=str)
def test_residual_calls_left_to_the_original(options, training):
    module = make(ResidualVQ, num_quantizers=3, **options).train(training)
    assert_trains_alike(module, served=False)


def test_copies_are_swapped_and_pickles_are_not():
    module = make(ResidualVQ, num_quantizers=3, shared_codebook=True)
    ours, report = swapped_copy(module)
    copied = copy.deepcopy(ours)
    assert all("forward" in vars(layer) for layer in copied.layers)
    for a, b in zip(train(copied)[0][0][0], train(module)[0][0][0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.layers[0]._codebook.embed, make(ResidualVQ, num_quantizers=3).layers[0]._codebook.embed)
    loaded = pickle.loads(pickle.dumps(ours))
    assert loaded.state_dict().keys() == ours.state_dict().keys()
    assert not report.left_to_the_original
