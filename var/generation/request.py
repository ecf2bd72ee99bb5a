"""The options of a generation with their checks, and its result."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..model.transformer import checked_labels

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Generated(NamedTuple):
    """Result of a generation."""

    tokens: Tensor  # (B, L) int64, as sampled
    images: Tensor  # (B, 3, H, W) in [−1, 1]


class Kept(NamedTuple):
    """Tokens that editing keeps: `tokens` (B, L) and, for each scale, a mask (l_k,) that is True where they stay."""

    tokens: Tensor
    masks: tuple[Tensor, ...]


Labels = Tensor | Sequence[int] | int
OnScale = Callable[[int, Callable[[], Tensor]], None]


class Options(NamedTuple):
    """The options that are the same for all scales. They are constants of a captured graph."""

    cfg: float
    top_k: int
    top_p: float

    @property
    def guided(self) -> bool:
        return self.cfg > 0


def checked_options(cfg: float, top_k: int, top_p: float) -> Options:
    """The options as Python numbers. Raises TypeError for what is no number, ValueError for one out of its range."""
    cfg, top_k, top_p = _real("cfg", cfg), _integer("top_k", top_k), _real("top_p", top_p)
    if not 0 <= cfg < math.inf:
        raise ValueError(f"cfg: expected a finite number ≥ 0, got {cfg}")
    if top_k < 0:
        raise ValueError(f"top_k: expected an integer ≥ 0 (0: off), got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: expected a number in [0, 1] (0: off), got {top_p}")
    return Options(cfg, top_k, top_p)


def class_numbers(labels: Labels, num_classes: int) -> Tensor:
    """The labels as a tensor (B,) int64, on the device where they are: on a GPU, looking at them waits for it.

    Raises TypeError for what is no integer, and ValueError for a rank above 1 or a value outside of [0, num_classes].
    """
    tensor = _integers("labels", labels)
    if tensor.dim() > 1:
        raise ValueError(f"labels: expected one class number for each image, got shape {tuple(tensor.shape)}")
    return checked_labels(tensor.reshape(-1), num_classes)


def checked_seeds(seeds: Sequence[int] | Tensor | None, seed: int | None, batch: int) -> Tensor | None:
    """The seeds as a tensor (batch,) int64, or None if there are none.

    Raises TypeError for what is no integer, ValueError for seeds of another shape, and if `seed` is given too.
    """
    if seeds is None:
        return None
    if seed is not None:
        raise ValueError("seed: expected one of seed and seeds, got both")
    tensor = _integers("seeds", seeds)
    if tuple(tensor.shape) != (batch,):
        raise ValueError(f"seeds: expected {batch} integers, one for each label, got shape {tuple(tensor.shape)}")
    return tensor


def checked_seed(seed: int | None) -> int | None:
    """`seed` as a Python integer. Raises TypeError for what is no integer, ValueError for one of more than 64 bits."""
    if seed is None:
        return None
    seed = _integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    return seed


def _integer(argument: str, value: Any) -> int:
    try:
        return operator.index(value)  # takes integers of Python, of numpy and of torch, and no floats
    except TypeError:
        raise TypeError(f"{argument}: expected an integer, got {_described(value)}") from None


def _real(argument: str, value: Any) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{argument}: expected a number, got {_described(value)}") from None


def _integers(argument: str, values: Any) -> Tensor:
    """Integers of Python, numpy or torch, alone or in any sequence, as an int64 tensor."""
    if isinstance(values, range):
        values = list(values)
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{argument}: expected integers of 64 bits, got {_described(values)}") from None
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"{argument}: expected integers, got {_described(values)}")
    return tensor.long()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    text = repr(value)
    return f"{text if len(text) < 80 else text[:80] + ' …'} ({type(value).__name__})"
