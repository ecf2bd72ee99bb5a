"""What every backend of the search is held to: the code that is nearest in float64."""

import torch


def scores_and_band(z: torch.Tensor, codebook: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact scores in float64, and a bound of the error of each in fp32, both (N, V).

    The score z·c - |c|²/2 is a chain of C multiply-adds that starts at the rounded |c|²/2, itself a chain of C: in any
    order of summation its error is at most gamma(2C + 2) times the sum of the terms' magnitudes, with
    gamma(n) = n·u / (1 - n·u) and u = 2^-24. Normalising a code (cosine) adds C + 3 roundings to each factor.
    """
    z, codes = z.double(), codebook.double()
    unit_roundoff, channels = 2.0**-24, z.shape[-1]
    if metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=-1, eps=1e-12)
        half_norm = torch.zeros(codes.shape[0], dtype=torch.float64)
        roundings = 2 * channels + 3
    else:
        half_norm = 0.5 * codes.square().sum(-1)
        roundings = 2 * channels + 2
    gamma = roundings * unit_roundoff / (1 - roundings * unit_roundoff)
    return z @ codes.T - half_norm, gamma * (z.abs() @ codes.abs().T + half_norm)


def assert_nearest(index: torch.Tensor, z: torch.Tensor, codebook: torch.Tensor, metric: str) -> None:
    """Each index is the exact one, or its exact score is below the maximum by no more than both scores' errors."""
    assert index.dtype == torch.int64 and index.shape == z.shape[:-1]
    assert ((index >= 0) & (index < codebook.shape[0])).all()
    scores, band = scores_and_band(z, codebook, metric)
    rows = torch.arange(z.shape[0])
    best = scores.argmax(-1)
    gap = scores[rows, best] - scores[rows, index]
    allowed = band[rows, best] + band[rows, index]
    assert (gap <= allowed).all(), f"chosen codes are farther by up to {(gap - allowed).max()} than rounding explains"
