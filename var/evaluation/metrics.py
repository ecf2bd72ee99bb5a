"""Measures of images, codes and features: PSNR, use of a codebook, Fréchet distance."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) of each image in dB. Both arguments are (B, …) in [-1, 1], so the peak is 2.

    `images` is clamped to [-1, 1] first, as on a display. Identical images give +inf.
    """
    if images.shape != reference.shape:
        raise ValueError(f"images: expected the shape of reference {tuple(reference.shape)}, got {tuple(images.shape)}")
    error = (images.clamp(-1, 1).double() - reference.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


def code_counts(tokens: Tensor, vocab_size: int) -> Tensor:
    """How often each code occurs in `tokens` (integers of any shape): (vocab_size,) int64."""
    flat = tokens.flatten().long()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < vocab_size:
        raise ValueError(f"tokens: expected 0..{vocab_size - 1}, got {int(flat.min())}..{int(flat.max())}")
    return flat.bincount(minlength=vocab_size)


def used_codes(counts: Tensor) -> float:
    """Fraction of the codes that occur at least once."""
    return float((counts > 0).double().mean())


def code_perplexity(counts: Tensor) -> float:
    """exp(entropy) of the distribution of the codes: as many codes of equal frequency carry the same information."""
    p = counts.double() / counts.sum().clamp(min=1)
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def codebook_usage(tokens: Tensor, vocab_size: int) -> float:
    """Fraction of `vocab_size` codes that occur in `tokens`."""
    return used_codes(code_counts(tokens, vocab_size))


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians fitted to two feature sets (N_a, D), (N_b, D), in float64.

    It is |μa − μb|² + tr(Ca + Cb − 2·(Ca^½ Cb Ca^½)^½), with unbiased covariances. The symmetric form has only real,
    non-negative eigenvalues, so even singular covariances need neither a general matrix square root nor a regulariser.
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
    # Because of rounding, the distance of equal sets can be slightly negative.
    return max(0.0, float(distance))
