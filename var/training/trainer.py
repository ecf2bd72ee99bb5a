"""The training loop that the tokenizer and the transformer share.

It takes a model and a function ``loss(step) -> {"loss": tensor, …}`` and does the rest: AdamW with linear warm-up and
cosine decay, gradient clipping, an exponential moving average (EMA) of the weights, bf16 autocast, progress and curves,
atomic checkpoints, resuming and interruption. A resumed run computes bit for bit the same as an uninterrupted one: the
order of the data and all random numbers of the losses are functions of (seed, step), and the checkpoint holds
everything else.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from var_kernels._only_writer import only_writer
from var_kernels.native.build import write_atomically

from ..data.interface import DataError, ImageData, describe
from .options import TrainingError, TrainingOptions, TrainingResult
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


@contextmanager
def only_training(output: Path) -> Iterator[None]:
    """Keeps other trainings out of the run directory `output`. Raises `TrainingError` if one is there already."""
    with ExitStack() as lock:
        try:
            lock.enter_context(only_writer(output, folder=True))
        except BlockingIOError as error:
            raise TrainingError(f"output: another process is writing to {output}") from error
        except OSError as error:
            raise TrainingError(f"output: cannot write to {output}: {error.strerror or error}") from error
        yield


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
    state = read_checkpoint(Path(os.path.expanduser(output)) / CHECKPOINT_NAME, title, mmap=True)
    return state["config"] | {name: value for name, value in state["options"].items() if name != "model"}


class Trainer:
    """Trains `model` for `options.max_steps` steps.

    `config` (a dict of plain values) identifies the model: a checkpoint with another configuration is refused. `extra`
    holds further tensors of the run. They are changed in place, and the checkpoint contains them. `data` is the data
    set of the run: a resumed run must have as many images of the same classes.
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
        data: ImageData | None = None,
    ) -> None:
        self.model, self.options, self.title, self.data = model, options, title, data
        self.config = config | ({"data": describe(data)} if data is not None else {})
        self._files = {"classes": list(data.class_names), "files": data.fingerprint()} if data is not None else {}
        self.tokens_per_image = tokens_per_image
        self.extra = extra if extra is not None else {}
        self.step, self.seconds = 0, 0.0
        self.validation: dict[str, float] = {}
        self._validated = 0  # the step of the last validation
        self._window: dict[str, list[float]] = {}
        self._notes: list[str] = []  # what the user should know about this run
        self._shown: set[str] = set()
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
            "data": self._files,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "extra": self.extra,
            "window": self._window,
            "validation": self.validation,
            "validated": self._validated,
        }
        write_checkpoint(self.checkpoint_path, payload)

    def restore(self) -> None:
        """Reads checkpoint.pt. Raises `TrainingError` for another model and for options that must stay the same."""
        path = self.checkpoint_path
        state = read_checkpoint(path, self.title)
        options = dataclasses.asdict(self.options)
        wanted = {k: options[k] for k in _FIXED_ON_RESUME}
        changed = [
            f"{k} {v!r} (so far {state['options'][k]!r})"
            for k, v in options.items()
            if k not in _FREE_ON_RESUME and v != state["options"].get(k, v)
        ]
        if changed:
            self._notes.append(f"resumed with other options: {', '.join(changed)}")
        self._compare_files(state.get("data", {}))
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
        self.validation, self._validated = state["validation"], state.get("validated", self.step)

    def _compare_files(self, saved: dict[str, Any]) -> None:
        """Compares the data with those of the checkpoint, `saved`; an older checkpoint does not say what they were."""
        now = self._files.get("classes")
        classes = saved.get("classes", now)
        if classes != now:
            label, (was, is_now) = next(
                (i, pair) for i, pair in enumerate(itertools.zip_longest(classes, now)) if pair[0] != pair[1]
            )
            raise TrainingError(
                f"resume: the classes differ from {self.checkpoint_path}: class {label} was {was!r}, now {is_now!r}"
            )
        if saved.get("files", self._files.get("files")) != self._files.get("files"):
            self._notes.append("these are not the images of the checkpoint: files were replaced, or have other times")

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
        first_step = self.step
        try:
            with TrainingDisplay(self.title, self.options.max_steps) as display, StopSignal() as stop:
                self.model.train()
                self._show_notes(display)
                reason = self._loop(loss_fn, display, stop, after_step, validate)
                self._show_notes(display)
                self.save()
                self.model.eval()
                with self.averaged_weights():
                    export(weights)
                display.note(f"{reason} at step {self.step}; checkpoint {self.checkpoint_path}, weights {weights}")
        except DataError as error:
            raise self._after_checkpoint(error, first_step) from error
        except OSError as error:
            where = error.filename or self.options.output
            raise TrainingError(
                f"training stopped at step {self.step}: {where}: {error.strerror or error}; {self._last_checkpoint()}"
            ) from error
        return TrainingResult(self.step, reason, self.checkpoint_path, weights, self.seconds, self.validation)

    def _show_notes(self, display: TrainingDisplay) -> None:
        """Shows what is new of what the user should know about the run and its data."""
        for line in [*self._notes, *(self.data.remarks() if self.data is not None else ())]:
            if line not in self._shown:
                self._shown.add(line)
                display.note(line)

    def _after_checkpoint(self, error: DataError, first_step: int) -> DataError:
        """What to raise for an unreadable image, after a checkpoint of the steps that this run has taken.

        The weights are those of the last whole step, because images are read before anything changes.
        """
        if self.step == first_step:
            return error
        try:
            self.save()
            left = f"checkpoint {self.checkpoint_path}: put the file right and resume, or resume with skip_broken"
        except TrainingError as failure:
            left = str(failure)
        return DataError(f"{error}; stopped at step {self.step}; {left}")

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
        if validate is not None and self._validation_is_due() and self._validated != self.step:
            self._validate(validate, log, display)  # which a broken image has prevented
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
            if validate is not None and self._validation_is_due():
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
        self._show_notes(display)
        steps_per_second = meter.rate(self.step)
        images = steps_per_second * self.options.batch_size
        rates = {"images/s": images, "tokens/s": images * self.tokens_per_image}
        log.write({"step": self.step, **means, **rates, "seconds": self.seconds})
        left = (self.options.max_steps - self.step) / steps_per_second
        if self.options.max_minutes is not None:
            left = min(left, 60 * self.options.max_minutes - meter.total())
        display.update(self.step, means | rates, left)

    def _validation_is_due(self) -> bool:
        every = self.options.val_every
        return self.step == self.options.max_steps or (self.step > 0 and every > 0 and self.step % every == 0)

    def _validate(self, validate: Callable[[], dict[str, float]], log: JsonLinesLog, display: TrainingDisplay) -> None:
        self.model.eval()
        with self.averaged_weights(), torch.no_grad():
            self.validation = validate()
        self.model.train()
        self._validated = self.step
        log.write({"step": self.step, **self.validation})
        display.note(f"step {self.step} validation: " + "  ".join(f"{k} {v:.4g}" for k, v in self.validation.items()))


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with tuples as lists and paths as strings, so that they compare equal to those of a checkpoint."""
    convert = {tuple: list, **{kind: str for kind in (type(Path()), Path)}}
    return {key: convert.get(type(value), lambda v: v)(value) for key, value in values.items()}
