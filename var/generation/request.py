"""The options of a generation with their checks, and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Generated(NamedTuple):
    """Result of a generation."""

    tokens: Tensor  # (B, L) int64, as sampled
    images: Tensor  # (B, 3, H, W) in [−1, 1]


class Kept(NamedTuple):
    """Tokens that editing keeps: `tokens` (B, L) and, for each scale, a mask (l_k,) that is True where they stay."""

    tokens: Tensor
    masks: tuple[Tensor, ...]


OnScale = Callable[[int, Callable[[], Tensor]], None]


class Options(NamedTuple):
    """The options that are the same for all scales. They are constants of a captured graph."""

    cfg: float
    top_k: int
    top_p: float

    @property
    def guided(self) -> bool:
        return self.cfg > 0


def check_options(cfg: float, top_k: int, top_p: float) -> None:
    """Raise ValueError for an option outside of its range."""
    if not cfg >= 0 or cfg == float("inf"):
        raise ValueError(f"cfg: expected a finite number ≥ 0, got {cfg}")
    if top_k < 0:
        raise ValueError(f"top_k: expected an integer ≥ 0 (0: off), got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: expected a number in [0, 1] (0: off), got {top_p}")


def checked_seeds(seeds: Sequence[int] | Tensor | None, seed: int | None, batch: int) -> Tensor | None:
    """The seeds as a tensor (batch,) int64, or None if there are none.

    Raises ValueError for seeds of another shape or dtype, and if `seed` is given too.
    """
    if seeds is None:
        return None
    if seed is not None:
        raise ValueError("seed: expected one of seed and seeds, got both")
    if not isinstance(seeds, Tensor):
        seeds = torch.tensor(list(seeds), dtype=torch.int64)
    if seeds.dtype != torch.int64 or tuple(seeds.shape) != (batch,):
        raise ValueError(f"seeds: expected {batch} 64-bit integers, one for each label, got shape "
                         f"{tuple(seeds.shape)} {seeds.dtype}")
    return seeds
