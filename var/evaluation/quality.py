"""Measured quality of a tokenizer and a generator: PSNR, codebook use, class agreement, Fréchet distance.

The Fréchet distance here is taken on the features of a small classifier trained on the data set itself, not on
Inception features: it compares models of one data set with one another and with the floor that real images reach, and
must not be compared with published FID values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.datasets import ImageData, batch_indices, split_indices, step_generator
from ..generation.batches import image_seeds
from ..generation.generator import Generator

if TYPE_CHECKING:
    from ..model.transformer import VAR
    from ..model.vqvae import VQVAE


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image: (B, …) twice, values in [-1, 1] (peak 2), to (B,).

    `images` are clamped to [-1, 1] first, as a display would. Identical images give +inf.
    """
    if images.shape != reference.shape:
        raise ValueError(f"images: expected the shape of reference {tuple(reference.shape)}, got {tuple(images.shape)}")
    error = (images.clamp(-1, 1).double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


def code_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each of `vocab_size` codes occurs in `tokens` (any shape, integer): (vocab_size,) int64."""
    flat = tokens.flatten().long()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < vocab_size:
        raise ValueError(f"tokens: expected 0..{vocab_size - 1}, got {int(flat.min())}..{int(flat.max())}")
    return flat.bincount(minlength=vocab_size)


def used_codes(counts: Tensor) -> float:
    """Fraction of the codes that occur at all."""
    return float((counts > 0).double().mean())


def code_perplexity(counts: Tensor) -> float:
    """exp(entropy) of the code distribution: the number of equally popular codes that would be as informative."""
    p = counts.double() / counts.sum().clamp(min=1)
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def codebook_usage(tokens: Tensor, vocab_size: int) -> float:
    """Fraction of `vocab_size` codes that occur in `tokens`."""
    return used_codes(code_counts(tokens, vocab_size))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two feature sets (N_a, D), (N_b, D), in float64.

    |μa − μb|² + tr(Ca + Cb − 2·(Ca^½ Cb Ca^½)^½), with unbiased covariances. The symmetric form has only real,
    non-negative eigenvalues, so singular covariances need neither a general matrix square root nor a regulariser.
    """
    moments = []
    for name, features in (("features_a", features_a), ("features_b", features_b)):
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name}: expected shape (N >= 2, D), got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError(f"{name}: expected finite values")
        moments.append((features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))))
    (mean_a, cov_a), (mean_b, cov_b) = moments
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"features_b: expected {mean_a.size} features like features_a, got {mean_b.size}")
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
    spread = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross.clip(min=0)).sum()
    distance = np.square(mean_a - mean_b).sum() + spread
    # Rounding can leave a distance of equal sets a hair below zero.
    return max(0.0, float(distance))


# ------------------------------------------------------------------------------------------- the measuring classifier


class Classifier(nn.Module):
    """Small convolutional classifier that serves as measuring instrument: images (B, 3, S, S) in [-1, 1] to logits."""

    def __init__(self, num_classes: int, width: int = 32, feature_size: int = 64) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(widths[-1], widths[-1], 3, padding=1), nn.ReLU())
        self.embed = nn.Linear(widths[-1] * 4, feature_size)
        self.head = nn.Linear(feature_size, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate activations (B, feature_size)."""
        return F.relu(self.embed(F.adaptive_avg_pool2d(self.body(images), 2).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(images), 0.3, self.training))


def train_classifier(
    data: ImageData,
    indices: Tensor,
    *,
    epochs: float = 4,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> Classifier:
    """Classifier of `data` trained on `indices`: AdamW, one warm-up-and-decay cycle, label smoothing 0.1.

    On Fashion-MNIST the defaults reach about 92 % on the test images in about two minutes on two cores. `progress` is
    called with (step, steps, loss) every 50 steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(len(data.class_names)).to(memory_format=torch.channels_last).train()
        steps = max(1, round(epochs * (len(indices) // batch_size)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
        for step in range(steps):
            images, labels = data.batch(batch_indices(indices, batch_size, seed, step), step_generator(seed, step, 2))
            images = images.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None and (step + 1) % 50 == 0:
                progress(step + 1, steps, float(loss.detach()))
    return model.eval()


@torch.no_grad()
def classify(model: Classifier, images: Tensor, batch_size: int = 500) -> tuple[Tensor, np.ndarray]:
    """Predicted classes (N,) and features (N, D) of images (N, 3, S, S)."""
    features = torch.cat([model.features(chunk) for chunk in images.split(batch_size)])
    return model.head(features).argmax(1), features.numpy()


# -------------------------------------------------------------------------------------------------------- the report


@dataclass(frozen=True)
class QualityReport:
    """Figures of `evaluate`. Fractions are 0..1, PSNR in dB."""

    test_images: int
    psnr: float  # mean over test images
    mse: float  # of reconstructions, values in [-1, 1]
    codes_used: float  # fraction of the codebook that occurs in the test set
    codes_above_tenth: float  # fraction that occurs at least a tenth as often as the average code
    code_perplexity: float
    classifier_accuracy: float  # on real test images
    reconstruction_accuracy: float  # of the classifier, on reconstructed test images
    generated_images: int
    class_agreement: float  # generated images that the classifier gives their intended class
    class_agreement_by_class: tuple[float, ...]
    frechet_generated: float  # generated images against the test images
    frechet_floor: float  # as many held-out real training images against the test images
    frechet_reconstruction: float  # reconstructed test images against the test images

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def evaluate(
    vqvae: VQVAE,
    generate: Callable[[Tensor, list[int]], Tensor],
    train: ImageData,
    test: ImageData,
    *,
    classifier: Classifier | None = None,
    num_generated: int = 2000,
    held_out: int = 2000,
    batch_size: int = 100,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> QualityReport:
    """Quality of `vqvae` and of ``generate(labels, seeds) -> images`` on the data set of `train` and `test`.

    Generated labels cycle through the classes. The classifier is trained on `train` without its held-out images unless
    one is given; the floor is the Fréchet distance of min(held_out, num_generated) of those held-out images, because
    the distance is biased upwards for small sets and equal sizes make the two comparable. With `held_out` equal to the
    trainings' `val_images` these images were seen by no model: the split is the same.
    """
    say = progress or (lambda message: None)
    fit_indices, held_indices = split_indices(len(train), held_out)
    if classifier is None:
        say("training the measuring classifier")
        classifier = train_classifier(train, fit_indices, seed=seed)
    say(f"reconstructing {len(test)} test images")
    real = torch.cat([test.batch(part)[0] for part in torch.arange(len(test)).split(batch_size)])
    reconstructed, counts = _reconstruct(vqvae, real, batch_size)
    psnrs, mse = psnr(reconstructed, real), (reconstructed.clamp(-1, 1) - real).double().square().mean()
    real_classes, real_features = classify(classifier, real)
    reconstructed_classes, reconstructed_features = classify(classifier, reconstructed)
    say(f"generating {num_generated} images")
    numbers = torch.arange(num_generated)
    labels = numbers % len(train.class_names)
    seeds = image_seeds(seed, range(num_generated))
    generated = torch.cat([
        generate(labels[part], [seeds[i] for i in part]).clamp(-1, 1) for part in numbers.split(batch_size)
    ])
    generated_classes, generated_features = classify(classifier, generated.float().cpu())
    agrees = (generated_classes == labels).double()
    floor_images = train.batch(held_indices[:num_generated])[0]
    _, floor_features = classify(classifier, floor_images)
    return QualityReport(
        test_images=len(test),
        psnr=float(psnrs.mean()),
        mse=float(mse),
        codes_used=used_codes(counts),
        codes_above_tenth=float((counts >= 0.1 * counts.double().mean()).double().mean()),
        code_perplexity=code_perplexity(counts),
        classifier_accuracy=float((real_classes == test.labels).double().mean()),
        reconstruction_accuracy=float((reconstructed_classes == test.labels).double().mean()),
        generated_images=num_generated,
        class_agreement=float(agrees.mean()),
        class_agreement_by_class=tuple(
            float(agrees[labels == c].mean()) if bool((labels == c).any()) else math.nan
            for c in range(len(train.class_names))
        ),
        frechet_generated=frechet_distance(generated_features, real_features),
        frechet_floor=frechet_distance(floor_features, real_features),
        frechet_reconstruction=frechet_distance(reconstructed_features, real_features),
    )


@torch.no_grad()
def _reconstruct(vqvae: VQVAE, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Reconstructions of `images`, clamped to [-1, 1], and how often each code was used."""
    vocab_size = len(vqvae.quantize.embedding.weight)
    outputs, counts = [], torch.zeros(vocab_size, dtype=torch.int64)
    for chunk in images.split(batch_size):
        tokens = vqvae.encode(chunk.to(vqvae.quantize.embedding.weight.device))
        outputs.append(vqvae.decode(tokens).clamp(-1, 1).float().cpu())
        counts += code_counts(tokens.cpu(), vocab_size)
    return torch.cat(outputs), counts


def generator_of(
    model: VAR, vqvae: VQVAE, *, batch_size: int, precision: str = "fp32", **sampling: object
) -> Callable[[Tensor, list[int]], Tensor]:
    """``generate(labels, seeds) -> images`` for `evaluate`, at most `batch_size` labels at a time.

    `sampling` are options of a call of `Generator`.
    """
    generator = Generator(model, vqvae, batch_size=batch_size, precision=precision)
    return lambda labels, seeds: generator(labels, seeds=seeds, **sampling).images
