"""Measures the quality of a tokenizer and of a generator: PSNR, codebook use, class agreement, Fréchet distance.

The Fréchet distance is computed from the features of a small classifier trained on the data set itself, not from
Inception features. It compares models of one data set with one another, and with the floor that real images reach. It
must not be compared with published FID values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.interface import ImageData, default_held_out, split_indices
from ..generation.batches import image_seeds
from ..generation.generator import Generator
from .classifier import Classifier, classify, train_classifier
from .metrics import code_counts, code_perplexity, frechet_distance, psnr, used_codes

if TYPE_CHECKING:
    from ..model.transformer import VAR
    from ..model.vqvae import VQVAE


@dataclass(frozen=True)
class QualityReport:
    """Results of `evaluate`. Fractions are from 0 to 1, the PSNR is in dB."""

    test_images: int
    psnr: float  # mean over the test images
    mse: float  # of reconstructions, values in [-1, 1]
    codes_used: float  # fraction of the codes that occur in the test set
    codes_above_tenth: float  # fraction of the codes that occur at least a tenth as often as the average code
    code_perplexity: float
    classifier_accuracy: float  # on real test images
    reconstruction_accuracy: float  # of the classifier, on reconstructed test images
    generated_images: int
    class_agreement: float  # fraction of generated images that the classifier assigns to their intended class
    class_agreement_by_class: tuple[float, ...]
    frechet_generated: float  # generated images against the test images
    frechet_floor: float  # held-out real training images against the test images
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
    held_out: int | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> QualityReport:
    """Measure `vqvae` and ``generate(labels, seeds) -> images`` on the data set of `train` and `test`.

    The labels of the generated images cycle through the classes. If no classifier is given, one is trained on `train`
    without the held-out images. The floor is the Fréchet distance of min(held_out, num_generated) held-out images: the
    distance is biased upwards for small sets, and equal sizes make the two distances comparable. If `held_out` equals
    the `val_images` of the trainings, the split is the same, and no model has seen these images. From 20 images on
    the defaults are equal.
    """
    say = progress or (lambda message: None)
    if held_out is None:
        held_out = default_held_out(len(train), least=2)
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
    """The function ``generate(labels, seeds) -> images`` for `evaluate`. It takes at most `batch_size` labels.

    `sampling` holds options of a call of `Generator`.
    """
    generator = Generator(model, vqvae, batch_size=batch_size, precision=precision)
    return lambda labels, seeds: generator(labels, seeds=seeds, **sampling).images
