"""The arguments of a generation: what users pass as labels, seeds and options, and the errors for everything else."""

import numpy as np
import pytest
import torch

from tests.helpers.models import tiny_var, tiny_vqvae
from var import Generator, generate

PAIR = tiny_var(), tiny_vqvae()
OPTIONS = {"seed": 3, "top_k": 9, "top_p": 0.9, "cfg": 2.0}


def tokens(labels, **options):
    return generate(*PAIR, labels, **{**OPTIONS, **options}).tokens


@pytest.mark.parametrize(
    "labels",
    [[0, 4, 2], (0, 4, 2), np.array([0, 4, 2]), np.array([0, 4, 2], np.uint8), [np.int32(0), np.int64(4), np.uint8(2)],
     torch.tensor([0, 4, 2], dtype=torch.uint8), torch.tensor([0, 4, 2], dtype=torch.int32),
     [torch.tensor(0), torch.tensor(4), torch.tensor(2)], torch.tensor([[0, 4, 2]])[0]],
    ids=str,
)  # fmt: skip
def test_labels_in_other_forms_raised_raw_errors(labels):
    assert torch.equal(tokens(labels), tokens(torch.tensor([0, 4, 2])))
    generator = Generator(*PAIR, batch_size=3)
    assert torch.equal(generator(labels, **OPTIONS).tokens, tokens(torch.tensor([0, 4, 2])))
    assert sum(len(part.tokens) for part in Generator(*PAIR, batch_size=2).stream(labels, seeds=[1, 2, 3])) == 3


@pytest.mark.parametrize("label", [4, np.int64(4), np.uint8(4), torch.tensor(4), torch.tensor([4])], ids=str)
def test_one_label(label):
    assert torch.equal(tokens(label), tokens([4]))


@pytest.mark.parametrize(
    "labels", [[], (), range(0), np.array([], np.int64), torch.zeros(0, dtype=torch.int64)], ids=str
)
def test_no_labels(labels):
    result = generate(*PAIR, labels, **OPTIONS)
    assert result.tokens.shape == (0, 14) and result.images.shape == (0, 3, 6, 6)


def test_range_of_labels():
    assert torch.equal(tokens(range(3)), tokens([0, 1, 2]))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, TypeError, r"labels: expected integers of 64 bits, got None \(NoneType\)"),
        ("0,1", TypeError, r"labels: expected integers of 64 bits, got '0,1' \(str\)"),
        (["a"], TypeError, "labels: expected integers of 64 bits, got"),
        ([0, None], TypeError, "labels: expected integers of 64 bits, got"),
        ([0.5], TypeError, r"labels: expected integers, got \[0.5\] \(list\)"),
        (1.0, TypeError, "labels: expected integers, got 1.0"),
        (True, TypeError, "labels: expected integers, got True"),
        (np.array([1.0]), TypeError, "labels: expected integers"),
        (torch.tensor([1.0]), TypeError, "labels: expected integers, got a tensor of torch.float32"),
        (torch.tensor([True]), TypeError, "labels: expected integers, got a tensor of torch.bool"),
        ([[0, 1], [2, 3]], ValueError, r"labels: expected one class number for each image, got shape \(2, 2\)"),
        ([[0], [1, 2]], TypeError, "labels: expected integers of 64 bits"),
        ([6], ValueError, r"labels: expected values in \[0, 5\], got \[6, 6\]"),
        (-1, ValueError, r"labels: expected values in \[0, 5\], got \[-1, -1\]"),
        ([2**70], TypeError, "labels: expected integers of 64 bits"),
        ({0: 1}, TypeError, "labels: expected integers of 64 bits"),
    ],
    ids=str,
)  # fmt: skip
def test_labels_that_are_none(labels, error, message):
    with pytest.raises(error, match=message):
        tokens(labels)
    with pytest.raises(error, match=message):
        Generator(*PAIR)(labels)


@pytest.mark.parametrize(
    "options",
    [{"seed": np.int64(3)}, {"seed": np.uint8(3)}, {"seed": torch.tensor(3)}, {"top_k": np.int32(9)},
     {"top_k": torch.tensor(9)}, {"cfg": 2}, {"cfg": np.float32(2)}, {"cfg": torch.tensor(2.0)},
     {"top_p": np.float64(0.9)}],
    ids=str,
)  # fmt: skip
def test_numbers_of_numpy_and_torch(options):
    assert torch.equal(tokens([0, 4], **options), tokens([0, 4]))


@pytest.mark.parametrize("seeds", [[1, 2], (1, 2), np.array([1, 2]), np.array([1, 2], np.uint8), range(1, 3)], ids=str)
def test_seeds_in_other_forms(seeds):
    expected = generate(*PAIR, [0, 4], seeds=torch.tensor([1, 2])).tokens
    assert torch.equal(generate(*PAIR, [0, 4], seeds=seeds).tokens, expected)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1])
def test_every_seed_of_64_bits(seed):
    assert torch.equal(tokens([0], seed=seed), tokens([0], seed=seed))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 9.0}, TypeError, r"top_k: expected an integer, got 9.0 \(float\)"),
        ({"top_k": None}, TypeError, "top_k: expected an integer, got None"),
        ({"top_k": "9"}, TypeError, r"top_k: expected an integer, got '9' \(str\)"),
        ({"top_k": -1}, ValueError, "top_k: expected an integer ≥ 0"),
        ({"top_p": "0.9"}, TypeError, "top_p: expected a number, got '0.9'"),
        ({"top_p": None}, TypeError, "top_p: expected a number, got None"),
        ({"top_p": float("nan")}, ValueError, "top_p: expected a number in"),
        ({"top_p": 1.1}, ValueError, "top_p: expected a number in"),
        ({"cfg": [1.5, 2.0]}, TypeError, "cfg: expected a number, got"),
        ({"cfg": torch.tensor([1.0, 2.0])}, TypeError, "cfg: expected a number, got a tensor of torch.float32"),
        ({"cfg": float("nan")}, ValueError, "cfg: expected a finite number"),
        ({"cfg": -0.5}, ValueError, "cfg: expected a finite number"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer, got 1.5"),
        ({"seed": "1"}, TypeError, "seed: expected an integer, got '1'"),
        ({"seed": 2**64}, ValueError, "seed: expected an integer of 64 bits, got 18446744073709551616"),
        ({"seed": None, "seeds": 5}, ValueError, "seeds: expected 2 integers, one for each label"),
        ({"seed": None, "seeds": [1, 2, 3]}, ValueError, "seeds: expected 2 integers, one for each label"),
        ({"seed": None, "seeds": [1.0, 2.0]}, TypeError, "seeds: expected integers, got"),
        ({"seed": None, "seeds": "ab"}, TypeError, "seeds: expected integers of 64 bits, got 'ab'"),
        ({"seeds": [1, 2]}, ValueError, "seed: expected one of seed and seeds, got both"),
        ({"precision": "fp16"}, ValueError, "precision: expected one of fp32, bf16"),
        ({"precision": torch.bfloat16}, ValueError, "precision: expected one of fp32, bf16"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_are_no_numbers_or_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        tokens([0, 4], **options)
