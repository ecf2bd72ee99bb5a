"""What the tests of every backend of the search share: problems, and the comparison with float64."""

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from var_kernels.testing import randn


def centre_of(codebook: torch.Tensor) -> torch.Tensor:
    """The documented centre (C,), in float64: by channel the middle of 32 codes, or 0 if they are not far from it."""
    centre = []
    for column in codebook.double().T.tolist():
        some = [x for x in (column[i * len(column) // 32] for i in range(32)) if math.isfinite(x)] or [0.0]
        middle = (min(some) + max(some)) / 2
        centre.append(middle if abs(middle) > max(some) - min(some) else 0.0)
    return torch.tensor(centre, dtype=torch.float64)


def scores_and_band(z: torch.Tensor, codebook: torch.Tensor, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact scores in float64, and a bound of the error of each score in fp32; both are (N, V).

    The score z·c - |c|²/2 is a chain of C multiply-adds that starts at the rounded |c|²/2, which is a chain of C
    multiply-adds too. In any order of summation, the error is at most gamma(2C + 2) times the sum of the magnitudes of
    the terms, with gamma(n) = n·u / (1 - n·u) and u = 2^-24. Subtracting the centre adds one rounding to each factor.
    Cosine normalises the codes, which adds C + 3 roundings to each factor.
    """
    z, codes = z.double(), codebook.double()
    unit_roundoff, channels = 2.0**-24, z.shape[-1]
    if metric == "cosine":
        codes = torch.nn.functional.normalize(codes, dim=-1, eps=1e-12)
        half_norm = torch.zeros(codes.shape[0], dtype=torch.float64)
        roundings = 2 * channels + 3
    else:
        centre = centre_of(codebook)
        z, codes = z - centre, codes - centre
        half_norm = 0.5 * codes.square().sum(-1)
        roundings = 2 * channels + 4
    gamma = roundings * unit_roundoff / (1 - roundings * unit_roundoff)
    return z @ codes.T - half_norm, gamma * (z.abs() @ codes.abs().T + half_norm)


def assert_nearest(index: torch.Tensor, z: torch.Tensor, codebook: torch.Tensor, metric: str) -> None:
    """The exact score of each index is the maximum, or below it by no more than the bounds of both scores' errors."""
    assert index.dtype == torch.int64 and index.shape == z.shape[:-1]
    assert ((index >= 0) & (index < codebook.shape[0])).all()
    scores, band = scores_and_band(z, codebook, metric)
    rows = torch.arange(z.shape[0])
    best = scores.argmax(-1)
    gap = scores[rows, best] - scores[rows, index]
    allowed = band[rows, best] + band[rows, index]
    assert (gap <= allowed).all(), f"chosen codes are farther by up to {(gap - allowed).max()} than rounding explains"


def problems_of_small_integers(sizes: Iterable[tuple[int, int]]) -> Iterator[tuple[torch.Tensor, ...]]:
    """(z, codebook, the first nearest code of each row) for each (rows, codes) of `sizes`.

    The elements are -1, 0 and 1: nothing is rounded, so that the index must be exact, and there are many ties, which
    must go to the lowest index.
    """
    generator = torch.Generator().manual_seed(0)
    for rows, codes in sizes:
        z = torch.randint(-1, 2, (rows, 4), generator=generator).float()
        codebook = torch.randint(-1, 2, (codes, 4), generator=generator).float()
        distance = (z.unsqueeze(1) - codebook).square().sum(-1)
        yield z, codebook, (distance == distance.amin(-1, keepdim=True)).int().argmax(-1)


def problems_with_special_values(cases: int, codes: int, spoiled: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """`cases` pairs of z and codebook where 10 elements of z and `spoiled` of the codebook are NaN, ±inf or 0."""
    generator = torch.Generator().manual_seed(3)
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0])
    for case in range(cases):
        z, codebook = randn(20, 6, seed=case), randn(codes, 6, seed=100 + case)
        for tensor, count in ((z, 10), (codebook, spoiled)):
            where = torch.randint(tensor.numel(), (count,), generator=generator)
            tensor.view(-1)[where] = specials[torch.randint(4, (count,), generator=generator)]
        yield z, codebook


def problem_far_from_the_origin() -> tuple[torch.Tensor, torch.Tensor]:
    """z (N, 32) and 300 codes around a point that is a thousand times as far from 0 as the codes are from it.

    Its coordinates have both signs, and some are 0. Without a centre, the scores would round by more than most
    distances differ.
    """
    point = 1000.0 * (torch.arange(32) % 3 - 1)
    point[5], point[6] = -3e4, 0.0
    return randn(70, 32, seed=11) + point, randn(300, 32, seed=12) + point


def assert_as_exact_as_near_the_origin(search: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """The search finds what float64 finds for codes far from the origin, and breaks exact ties as documented there."""
    z, codebook = problem_far_from_the_origin()
    found = search(z, codebook)
    assert_nearest(found, z, codebook, "l2")
    exact = (z.double().unsqueeze(1) - codebook.double()).square().sum(-1).argmin(-1)
    assert (found != exact).sum() <= 1
    for z, codebook, first in problems_of_small_integers(((17, 31), (20, 200))):
        assert torch.equal(search(z + 4096, codebook + 4096), first)


def problem_of_tiny_codes() -> tuple[torch.Tensor, torch.Tensor]:
    """z and a codebook whose code 2 is the nearest by cosine.

    Codes 1 and 2 have the direction of z. Cosine divides a code shorter than 1e-12 by 1e-12 instead of its length, so
    that code 1, of length 2e-20, loses against any code of ordinary length. Code 2, of length 2e-11, does not.
    """
    z, direction = torch.ones(1, 4), torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    ordinary = direction * 1e-3 + torch.eye(4)[:1] * 1e-3
    return z, torch.cat([torch.zeros(1, 4), direction * 1e-20, direction * 1e-11, ordinary])
