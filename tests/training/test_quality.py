"""Quality measures are compared with values known in closed form."""

import math

import numpy as np
import pytest
import torch

from tests.helpers.training import VAR_CONFIG, VQVAE_CONFIG, write_fashion_mnist
from var.data.datasets import FashionMNIST, split_indices
from var.evaluation.classifier import Classifier, classify, train_classifier
from var.evaluation.metrics import code_counts, code_perplexity, codebook_usage, frechet_distance, psnr, used_codes
from var.evaluation.quality import evaluate, generator_of
from var.model.transformer import VAR
from var.model.vqvae import VQVAE


def test_psnr_of_a_constant_error():
    reference = torch.zeros(3, 3, 4, 4)
    images = reference + torch.tensor([0.2, 0.02, 0.0]).view(3, 1, 1, 1)
    # Peak 2: an error of 0.2 everywhere is 20·log10(2/0.2) = 20 dB.
    values = psnr(images, reference)
    torch.testing.assert_close(values[:2], torch.tensor([20.0, 40.0], dtype=torch.float64), atol=1e-4, rtol=0)
    assert values[2] == math.inf


def test_psnr_clamps_and_checks_shapes():
    assert psnr(torch.full((1, 2), 5.0), torch.ones(1, 2)) == math.inf
    with pytest.raises(ValueError, match=r"images: expected the shape of reference \(1, 2\), got \(2, 1\)"):
        psnr(torch.zeros(2, 1), torch.zeros(1, 2))


def test_codebook_statistics():
    tokens = torch.tensor([[0, 1, 1], [3, 3, 3]])
    counts = code_counts(tokens, 4)
    assert counts.tolist() == [1, 2, 0, 3]
    assert used_codes(counts) == codebook_usage(tokens, 4) == 0.75
    assert code_perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4)
    assert code_perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"tokens: expected 0..2, got 0..3"):
        code_counts(tokens, 3)


def gaussian(mean, covariance, count, seed=0):
    """Samples whose empirical mean and covariance are exactly the given ones."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_commuting_gaussians():
    # |Δμ|² + Σ(√a − √b)² for diagonal covariances.
    a = gaussian([0, 0, 0], np.diag([1.0, 4.0, 9.0]), 500, 1)
    b = gaussian([3, 0, -4], np.diag([4.0, 4.0, 1.0]), 400, 2)
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 0 + 4, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(30, rel=1e-9)


def test_frechet_distance_of_correlated_gaussians():
    # In two dimensions tr((AB)^½) = sqrt(tr(AB) + 2·sqrt(det(AB))).
    cov_a, cov_b = np.array([[2.0, 0.8], [0.8, 1.0]]), np.array([[1.0, -0.5], [-0.5, 3.0]])
    product = cov_a @ cov_b
    expected = 3 + 4 - 2 * math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    assert frechet_distance(gaussian([1, 1], cov_a, 300), gaussian([1, 1], cov_b, 300)) == pytest.approx(expected)


def test_frechet_distance_with_singular_covariances():
    x = np.random.default_rng(0).standard_normal((50, 1))
    line = np.hstack([x, 2 * x, np.zeros_like(x)])
    assert frechet_distance(line, line) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(line, line + [0, 0, 3]) == pytest.approx(9)
    few = np.random.default_rng(1).standard_normal((4, 64))  # fewer samples than features
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_bad_input():
    good = np.zeros((4, 3))
    with pytest.raises(ValueError, match="features_a: expected shape"):
        frechet_distance(np.zeros(4), good)
    with pytest.raises(ValueError, match="features_b: expected shape"):
        frechet_distance(good, good[:1])
    with pytest.raises(ValueError, match="features_b: expected 3 features like features_a, got 2"):
        frechet_distance(good, good[:, :2])
    with pytest.raises(ValueError, match="features_a: expected finite"):
        frechet_distance(good * np.nan, good)


def test_classifier_learns_and_is_reproducible(tmp_path):
    write_fashion_mnist(tmp_path, train=60, test=30)
    train, test = FashionMNIST(tmp_path), FashionMNIST(tmp_path, "test")
    state = torch.get_rng_state()
    models = [train_classifier(train, torch.arange(60), epochs=8, batch_size=15) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state does not change
    images, labels = test.batch(torch.arange(30))
    (classes, features), (again, _) = (classify(model, images) for model in models)
    assert torch.equal(classes, again)
    assert features.shape == (30, 64)
    assert (classes == labels).float().mean() > 0.6  # chance is 0.1


def test_report(tmp_path):
    write_fashion_mnist(tmp_path, train=40, test=20)
    train, test = FashionMNIST(tmp_path), FashionMNIST(tmp_path, "test")
    vqvae, model = VQVAE(VQVAE_CONFIG, "reference").eval(), VAR(VAR_CONFIG, "reference").eval()
    classifier = Classifier(10).eval()
    options = {"classifier": classifier, "num_generated": 25, "held_out": 15, "batch_size": 10}
    report = evaluate(vqvae, generator_of(model, vqvae, batch_size=10, cfg=0.0), train, test, **options)
    assert report == evaluate(vqvae, generator_of(model, vqvae, batch_size=10, cfg=0.0), train, test, **options)
    smaller_groups = generator_of(model, vqvae, batch_size=3, cfg=0.0)
    other = evaluate(vqvae, smaller_groups, train, test, **options | {"batch_size": 3})
    assert other.frechet_generated == pytest.approx(report.frechet_generated, rel=1e-6)  # the same images
    assert report.test_images == 20 and report.generated_images == 25
    assert 0 < report.codes_used <= 1 and 1 <= report.code_perplexity <= VQVAE_CONFIG.vocab_size
    assert len(report.class_agreement_by_class) == 10
    expected = (4 / np.array(report.mse)).item()
    assert abs(report.psnr - 10 * math.log10(expected)) < 1  # two different orders of mean and logarithm
    assert report.frechet_generated > report.frechet_floor >= 0
    real = test.batch(torch.arange(20))[0]
    held = train.batch(split_indices(40, 15)[1])[0]
    floor = frechet_distance(classify(classifier, held)[1], classify(classifier, real)[1])
    assert report.frechet_floor == pytest.approx(floor)


def test_report_scores_a_perfect_generator_perfectly(tmp_path):
    write_fashion_mnist(tmp_path, train=40, test=20)
    train, test = FashionMNIST(tmp_path), FashionMNIST(tmp_path, "test")
    classifier = Classifier(10).eval()
    real, _ = test.batch(torch.arange(20))
    # Labels cycle through the classes as the test images of this file do. A generator that returns the test images is
    # therefore right wherever the classifier is right.
    vqvae = VQVAE(VQVAE_CONFIG, "reference").eval()
    options = {"classifier": classifier, "num_generated": 20, "held_out": 10, "batch_size": 20}
    report = evaluate(vqvae, lambda labels, seed: real[: len(labels)], train, test, **options)
    assert report.class_agreement == report.classifier_accuracy
    assert report.frechet_generated == pytest.approx(0, abs=1e-6)
