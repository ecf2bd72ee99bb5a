"""The options that both trainings share, and how a training ends."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..data.interface import default_held_out

_BATCH = 64
_Options = TypeVar("_Options", bound="TrainingOptions")


class TrainingError(RuntimeError):
    """Training cannot start or go on. The message says why, and what is left on disk."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options common to both trainings. Steps are optimizer steps. The learning-rate schedule spans `max_steps`."""

    output: Path  # run directory: checkpoint.pt, log.jsonl and the exported weights
    data: Path | None = None  # see var.data.open_dataset
    max_steps: int = 10_000
    batch_size: int | None = None  # None: see `fitted`
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 1e-5  # learning rate of the last step
    warmup_steps: int = 200
    weight_decay: float = 0.05  # for the weights of Linear and convolution layers only
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest global norm of the gradient; 0 = no clipping
    ema_decay: float = 0.999  # 0 = no average, so the weights themselves are exported
    precision: str = "fp32"  # "fp32" or "bf16" (autocast)
    device: str = "cpu"
    seed: int = 0
    val_images: int | None = None  # training images that are held out for validation; None: see `fitted`
    val_every: int = 1000  # steps between validations; 0 = at the end only
    log_every: int = 50
    checkpoint_minutes: float = 5.0
    max_minutes: float | None = None  # stop after this time and write a checkpoint; `resume` continues from it
    resume: bool = False
    backend: str = "auto"  # of the var_kernels ops
    skip_broken: bool = False  # folders of images only; see var.data.ImageFolder

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "output", Path(self.output).expanduser())
        except RuntimeError as error:  # there is no home, and a folder named "~" is not what is meant
            raise ValueError(f"output: expected a folder, got {str(self.output)!r} ({error})") from error
        _require(self.max_steps >= 1, "max_steps", "a positive number", self.max_steps)
        _require(self.batch_size is None or self.batch_size >= 1, "batch_size", "a positive number", self.batch_size)
        _require(self.val_images is None or self.val_images >= 0, "val_images", "zero or more", self.val_images)
        _require(self.lr > 0 and math.isfinite(self.lr), "lr", "a positive number", self.lr)
        _require(0 <= self.min_lr <= self.lr, "min_lr", f"0..lr ({self.lr})", self.min_lr)
        _require(0 <= self.warmup_steps, "warmup_steps", "zero or more", self.warmup_steps)
        _require(0 <= self.ema_decay < 1, "ema_decay", "0 <= ema_decay < 1", self.ema_decay)
        _require(self.grad_clip >= 0, "grad_clip", "zero or more", self.grad_clip)
        _require(self.log_every >= 1, "log_every", "a positive number", self.log_every)
        _require(self.precision in ("fp32", "bf16"), "precision", "'fp32' or 'bf16'", self.precision)
        _require(self.seed >= 0, "seed", "zero or more", self.seed)

    def fitted(self: _Options, images: int) -> _Options:
        """The options for a data set of `images` images.

        If `val_images` is None, a tenth of the images is held out, at most 2000. If `batch_size` is None, it is 64, or
        the number of the other images if that is less.
        """
        held_out = default_held_out(images) if self.val_images is None else self.val_images
        batch_size = min(_BATCH, max(1, images - held_out)) if self.batch_size is None else self.batch_size
        return dataclasses.replace(self, val_images=held_out, batch_size=batch_size)


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended: `reason` is "finished", "interrupted" or "time limit"."""

    step: int
    reason: str
    checkpoint: Path
    weights: Path
    seconds: float
    validation: dict[str, float]  # results of the last validation


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
