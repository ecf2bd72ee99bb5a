"""The training loop that the tokenizer and the transformer share.

It takes a model and a function ``loss(step) -> {"loss": tensor, …}`` and does the rest: AdamW with linear warm-up and
cosine decay, gradient clipping, an exponential moving average (EMA) of the weights, bf16 autocast, progress and curves,
atomic checkpoints, resuming and interruption. A resumed run computes bit for bit the same as an uninterrupted one: the
order of the data and all random numbers of the losses are functions of (seed, step), and the checkpoint holds
everything else.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_kernels.native.build import write_atomically

from .progress import JsonLinesLog, StepMeter, TrainingDisplay

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "log.jsonl"
_CHECKPOINT_FORMAT = 1
# A resumed run must have the same values of these options, else it would not be the same run.
_FIXED_ON_RESUME = ("batch_size", "seed", "val_images", "ema_decay")
# A resumed run may change these without a message: they do not influence the losses, or they are compared elsewhere
# (the model and the tokenizer). If it changes any other option, a message names the change.
_FREE_ON_RESUME = frozenset({
    "output", "data", "resume", "device", "backend", "val_every", "log_every", "checkpoint_minutes", "max_minutes",
    "model", "tokenizer", "encode_batch",
})  # fmt: skip


class TrainingError(RuntimeError):
    """Training cannot start or go on. The message says why, and what is left on disk."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options common to both trainings. Steps are optimizer steps. The learning-rate schedule spans `max_steps`."""

    output: Path  # run directory: checkpoint.pt, log.jsonl and the exported weights
    data: Path | None = None  # see var.data.open_dataset
    max_steps: int = 10_000
    batch_size: int = 64
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
    val_images: int = 2000  # training images that are held out for validation
    val_every: int = 1000  # steps between validations; 0 = at the end only
    log_every: int = 50
    checkpoint_minutes: float = 5.0
    max_minutes: float | None = None  # stop after this time and write a checkpoint; `resume` continues from it
    resume: bool = False
    backend: str = "auto"  # of the var_kernels ops

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output).expanduser())
        _require(self.max_steps >= 1, "max_steps", "a positive number", self.max_steps)
        _require(self.batch_size >= 1, "batch_size", "a positive number", self.batch_size)
        _require(self.lr > 0 and math.isfinite(self.lr), "lr", "a positive number", self.lr)
        _require(0 <= self.min_lr <= self.lr, "min_lr", f"0..lr ({self.lr})", self.min_lr)
        _require(0 <= self.warmup_steps, "warmup_steps", "zero or more", self.warmup_steps)
        _require(0 <= self.ema_decay < 1, "ema_decay", "0 <= ema_decay < 1", self.ema_decay)
        _require(self.grad_clip >= 0, "grad_clip", "zero or more", self.grad_clip)
        _require(self.log_every >= 1, "log_every", "a positive number", self.log_every)
        _require(self.precision in ("fp32", "bf16"), "precision", "'fp32' or 'bf16'", self.precision)
        _require(self.seed >= 0, "seed", "zero or more", self.seed)


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


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Linear warm-up over `warmup_steps`, then half a cosine from `lr` down to `min_lr` at the last step."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    span = max(1, options.max_steps - 1 - options.warmup_steps)
    fraction = min(1.0, (step - options.warmup_steps) / span)
    return options.min_lr + 0.5 * (options.lr - options.min_lr) * (1 + math.cos(math.pi * fraction))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: only weights of Linear and convolution layers decay, not biases, norms, embeddings
    and parameters that belong to no layer."""
    decayed, kept = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_weight = name == "weight" and parameter.ndim >= 2 and not isinstance(module, nn.Embedding)
                (decayed if is_weight else kept).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


class StopSignal:
    """Context manager: the first SIGINT or SIGTERM sets `requested`, and a second SIGINT interrupts as usual."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        # Python allows signal handlers in the main thread only. The program must stop a training in another thread.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def write_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Saves to a temporary file in the folder of `path`, flushes it to the disk, then renames it to `path`.

    If this fails (for example because the disk is full), the temporary file is removed, a previous `path` stays as it
    was, and the `TrainingError` says so.
    """

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())

    try:
        write_atomically(path, write)
    except (OSError, RuntimeError) as error:
        # torch.save reports a failed write as RuntimeError.
        left = "the previous checkpoint is intact" if path.exists() else "there is no earlier checkpoint"
        raise TrainingError(f"could not write {path}: {error}; {left}") from error


def read_checkpoint(path: Path, title: str, mmap: bool = False) -> dict[str, Any]:
    """The checkpoint of a run named `title` ("tokenizer" or "transformer"). With `mmap` tensors stay in the file."""
    if not path.exists():
        raise TrainingError(f"resume: no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise TrainingError(f"resume: {path} is not a readable checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _CHECKPOINT_FORMAT or state.get("title") != title:
        raise TrainingError(f"resume: {path} is not a checkpoint of `{title}`")
    return state


def saved_options(output: str | Path, title: str) -> dict[str, Any]:
    """The options of the run in `output` by name, with the sizes of its model. A resumed run should not change them."""
    state = read_checkpoint(Path(output).expanduser() / CHECKPOINT_NAME, title, mmap=True)
    return state["config"] | {name: value for name, value in state["options"].items() if name != "model"}


class Trainer:
    """Trains `model` for `options.max_steps` steps.

    `config` (a dict of plain values) identifies the model: a checkpoint with another configuration is refused. `extra`
    holds further tensors of the run. They are changed in place, and the checkpoint contains them.
    """

    def __init__(
        self,
        model: nn.Module,
        options: TrainingOptions,
        *,
        title: str,
        config: dict[str, Any],
        tokens_per_image: int,
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        self.model, self.options, self.title, self.config = model, options, title, config
        self.tokens_per_image = tokens_per_image
        self.extra = extra if extra is not None else {}
        self.step, self.seconds = 0, 0.0
        self.validation: dict[str, float] = {}
        self._window: dict[str, list[float]] = {}
        self._changed: list[str] = []  # the options that differ from those of the resumed run
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        betas = (options.beta1, options.beta2)
        groups = parameter_groups(model, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if options.ema_decay else {}
        self.checkpoint_path = options.output / CHECKPOINT_NAME
        self._open_output()
        if options.resume:
            self.restore()

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _open_output(self) -> None:
        try:
            self.options.output.mkdir(parents=True, exist_ok=True)
            probe = self.options.output / f".{os.getpid()}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise TrainingError(f"output: cannot write to {self.options.output}: {error.strerror or error}") from error
        if self.checkpoint_path.exists() and not self.options.resume:
            raise TrainingError(f"output: {self.checkpoint_path} exists: resume it, or choose another directory")

    def save(self) -> None:
        """Writes checkpoint.pt: weights, their average, optimizer, step and metrics not yet logged."""
        options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self.options).items()}
        payload = {
            "format": _CHECKPOINT_FORMAT,
            "title": self.title,
            "config": self.config,
            "options": options,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "extra": self.extra,
            "window": self._window,
            "validation": self.validation,
        }
        write_checkpoint(self.checkpoint_path, payload)

    def restore(self) -> None:
        """Reads checkpoint.pt. Raises `TrainingError` for another model and for options that must stay the same."""
        path = self.checkpoint_path
        state = read_checkpoint(path, self.title)
        options = dataclasses.asdict(self.options)
        wanted = {k: options[k] for k in _FIXED_ON_RESUME}
        self._changed = [
            f"{k} {v!r} (so far {state['options'].get(k)!r})"
            for k, v in options.items()
            if k not in _FREE_ON_RESUME and v != state["options"].get(k)
        ]
        for kind, new, old in (("model", self.config, state["config"]), ("option", wanted, state["options"])):
            changed = [f"{k}: checkpoint {old.get(k)!r}, now {v!r}" for k, v in new.items() if old.get(k) != v]
            if changed:
                raise TrainingError(f"resume: {kind} differs from {path}: {'; '.join(changed)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, tensor in self.ema.items():
            tensor.copy_(state["ema"][name])
        for name, tensor in self.extra.items():
            tensor.copy_(state["extra"][name])
        self.step, self.seconds, self._window = state["step"], state["seconds"], state["window"]
        self.validation = state["validation"]

    def _last_checkpoint(self) -> str:
        exists = self.checkpoint_path.exists()
        return f"the last checkpoint is {self.checkpoint_path}" if exists else "there is no checkpoint yet"

    # -------------------------------------------------------------------------------------------------------- steps

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast if `precision` is "bf16", else a context that does nothing."""
        if self.options.precision == "bf16":
            return torch.autocast(torch.device(self.options.device).type, torch.bfloat16)
        return nullcontext()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """A context in which the model holds the averaged (EMA) weights. Without EMA nothing changes."""
        raw = {name: self.parameters[name].detach().clone() for name in self.ema}
        self._set_parameters(self.ema)
        try:
            yield
        finally:
            self._set_parameters(raw)

    @torch.no_grad()
    def _set_parameters(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.ema:
            # The decay starts small, else the random initialisation would dominate the average of a short run.
            decay = min(self.options.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def _train_step(self, loss_fn: Callable[[int], dict[str, Tensor]]) -> None:
        rate = learning_rate(self.step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.autocast():
            metrics = loss_fn(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        metrics["loss"].backward()
        limit = self.options.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        values = {name: float(value.detach()) for name, value in metrics.items()} | {"grad_norm": float(norm)}
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            reason = f"training diverged at step {self.step}: {', '.join(bad)}"
            raise TrainingError(f"{reason}; {self._last_checkpoint()}; try a lower lr")
        self.optimizer.step()
        self.step += 1
        self._update_ema()
        for name, value in (values | {"lr": rate}).items():
            self._window.setdefault(name, []).append(value)

    def fit(
        self,
        loss_fn: Callable[[int], dict[str, Tensor]],
        *,
        weights: Path,
        export: Callable[[Path], None],
        after_step: Callable[[int], None] | None = None,
        validate: Callable[[], dict[str, float]] | None = None,
    ) -> TrainingResult:
        """Trains until `max_steps`, the time limit or a signal. Then it writes the checkpoint and the averaged weights.

        `after_step(step)` is called after optimizer step number `step`, counted from 1. `validate()` is called in
        evaluation mode and sees the averaged weights. `export(weights)` writes the model to that path, while it holds
        the averaged weights.
        """
        try:
            with TrainingDisplay(self.title, self.options.max_steps) as display, StopSignal() as stop:
                self.model.train()
                if self._changed:
                    display.note(f"resumed with other options: {', '.join(self._changed)}")
                reason = self._loop(loss_fn, display, stop, after_step, validate)
                self.save()
                self.model.eval()
                with self.averaged_weights():
                    export(weights)
                display.note(f"{reason} at step {self.step}; checkpoint {self.checkpoint_path}, weights {weights}")
        except OSError as error:
            where = error.filename or self.options.output
            raise TrainingError(
                f"training stopped at step {self.step}: {where}: {error.strerror or error}; {self._last_checkpoint()}"
            ) from error
        return TrainingResult(self.step, reason, self.checkpoint_path, weights, self.seconds, self.validation)

    def _loop(
        self,
        loss_fn: Callable[[int], dict[str, Tensor]],
        display: TrainingDisplay,
        stop: StopSignal,
        after_step: Callable[[int], None] | None,
        validate: Callable[[], dict[str, float]] | None,
    ) -> str:
        """Trains until the last step, the time limit or a signal. Returns the reason why it ended."""
        options = self.options
        log = JsonLinesLog(options.output / LOG_NAME, self.step if options.resume else None)
        meter = StepMeter(self.step)
        started = last_save = time.monotonic()
        before = self.seconds
        while self.step < options.max_steps:
            self._train_step(loss_fn)
            if after_step is not None:
                after_step(self.step)
            now = time.monotonic()
            self.seconds = before + now - started
            last = self.step == options.max_steps
            if last or self.step % options.log_every == 0:
                self._log(log, display, meter)
            elif self.step % 10 == 0:
                display.advance(self.step)
            if validate is not None and (last or (options.val_every and self.step % options.val_every == 0)):
                self._validate(validate, log, display)
            if last:
                break
            if stop.requested:
                return "interrupted"
            if options.max_minutes is not None and now - started > 60 * options.max_minutes:
                return "time limit"
            if now - last_save > 60 * options.checkpoint_minutes:
                self.save()
                last_save = now
        return "finished"

    def _log(self, log: JsonLinesLog, display: TrainingDisplay, meter: StepMeter) -> None:
        means = {name: sum(values) / len(values) for name, values in self._window.items()}
        self._window = {}
        steps_per_second = meter.rate(self.step)
        images = steps_per_second * self.options.batch_size
        rates = {"images/s": images, "tokens/s": images * self.tokens_per_image}
        log.write({"step": self.step, **means, **rates, "seconds": self.seconds})
        left = (self.options.max_steps - self.step) / steps_per_second
        if self.options.max_minutes is not None:
            left = min(left, 60 * self.options.max_minutes - meter.total())
        display.update(self.step, means | rates, left)

    def _validate(self, validate: Callable[[], dict[str, float]], log: JsonLinesLog, display: TrainingDisplay) -> None:
        self.model.eval()
        with self.averaged_weights(), torch.no_grad():
            self.validation = validate()
        self.model.train()
        log.write({"step": self.step, **self.validation})
        display.note(f"step {self.step} validation: " + "  ".join(f"{k} {v:.4g}" for k, v in self.validation.items()))


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with tuples as lists and paths as strings, so that they compare equal to those of a checkpoint."""
    convert = {tuple: list, **{kind: str for kind in (type(Path()), Path)}}
    return {key: convert.get(type(value), lambda v: v)(value) for key, value in values.items()}
