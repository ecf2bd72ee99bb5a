"""Training of the next-scale transformer on the tokens of a trained tokenizer.

All training images are tokenized once, before the first step, so a step uses no pixels. The loss is the cross-entropy,
its mean over all tokens of all scales. Classifier-free guidance needs an unconditional model, so a label becomes the
extra class `num_classes` with probability `label_dropout`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from var_kernels.native.build import write_atomically

from ..data.interface import ImageData, batch_indices, describe, step_generator
from ..model import checkpoints
from ..model.config import VARConfig
from ..model.transformer import VAR
from ..model.vqvae import VQVAE
from ..model.weights import weights_hash
from .data import open_training_data
from .options import TrainingError, TrainingOptions, TrainingResult
from .progress import TrainingDisplay
from .tokenizer import WEIGHTS_NAME as TOKENIZER_NAME
from .trainer import Trainer, only_training, plain

WEIGHTS_NAME = "var.safetensors"
_STREAM_INIT, _STREAM_BATCH, _STREAM_VIEWS = 4, 5, 6


@dataclass(frozen=True, kw_only=True)
class TransformerTraining(TrainingOptions):
    """Options of `train_transformer`."""

    tokenizer: Path  # weights written by train_tokenizer
    model: VARConfig
    label_dropout: float = 0.1
    random_crop: bool = False  # folders of images only; each view has other crops
    flip: bool = False  # folders of images only; each view has other flips
    views: int = 1  # number of tokenized copies of the training set, each with its own augmentation
    encode_batch: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tokenizer", Path(os.path.expanduser(self.tokenizer)))
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout: expected 0 <= label_dropout < 1, got {self.label_dropout}")
        if self.views < 1:
            raise ValueError(f"views: expected a positive number, got {self.views}")


def train_transformer(options: TransformerTraining) -> TrainingResult:
    """Trains a transformer and writes ``checkpoint.pt``, ``log.jsonl``, ``var.safetensors``, a copy of the tokenizer
    ``vqvae.safetensors`` and the token cache ``tokens-<hash>.npy`` to `options.output`.

    Raises `DataError` for unusable data and `TrainingError` if training cannot start or go on.
    """
    with only_training(options.output), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return _TransformerRun(options).run()


class _TransformerRun:
    def __init__(self, options: TransformerTraining) -> None:
        self.vqvae = load_tokenizer(options.tokenizer, options.backend).to(options.device).eval().requires_grad_(False)
        _check_match(options.model, self.vqvae)
        image_size = self.vqvae.config.image_size
        (self.data, self.train_indices, self.val_indices), options = open_training_data(options, image_size)
        self.options = options
        config = _with_class_names(options.model, self.data)
        self.model = VAR(config, options.backend)
        self.model.init_weights(step_generator(options.seed, 0, _STREAM_INIT))
        self.model.to(options.device)
        self.trainer = Trainer(
            self.model,
            options,
            title="transformer",
            config=plain(config.to_dict()) | {"tokenizer": weights_hash(self.vqvae)},
            tokens_per_image=config.schedule.length,
            data=self.data,
        )

    def run(self) -> TrainingResult:
        self.tokens = cached_tokens(self.vqvae, self.data, self.options)
        return self.trainer.fit(
            self._loss,
            weights=self.options.output / WEIGHTS_NAME,
            export=self._export,
            validate=self._validate if len(self.val_indices) else None,
        )

    def _batch(self, indices: Tensor, view: Tensor | int) -> tuple[Tensor, Tensor]:
        """(labels (B,), tokens (B, L) int64)."""
        tokens = torch.from_numpy(self.tokens[np.asarray(view), indices.numpy()].astype(np.int64))
        return self.data.labels[indices].to(self.options.device), tokens.to(self.options.device)

    def _loss(self, step: int) -> dict[str, Tensor]:
        options = self.options
        indices = batch_indices(self.train_indices, options.batch_size, options.seed, step)
        generator = step_generator(options.seed, step, _STREAM_BATCH)
        labels, tokens = self._batch(indices, torch.randint(options.views, (len(indices),), generator=generator))
        draws = torch.rand(len(labels), generator=generator)
        dropped = (draws < options.label_dropout).to(labels.device)
        labels = labels.masked_fill(dropped, options.model.num_classes)
        return self._metrics(labels, tokens)

    def _metrics(self, labels: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        with torch.autocast(tokens.device.type, enabled=False):
            features = self.vqvae.teacher_forcing_input(tokens)  # (B, L − l_1, C), in fp32 as in sampling
        logits = self.model(labels, features).float()  # (B, L, V)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        last = tokens.shape[1] - self.options.model.schedule.lengths[-1]
        with torch.no_grad():
            accuracy = (logits[:, last:].argmax(-1) == tokens[:, last:]).float().mean()
        return {"loss": loss, "last_scale_accuracy": accuracy}

    def _validate(self) -> dict[str, float]:
        totals = {"val_loss": 0.0, "val_last_scale_accuracy": 0.0}
        for indices in self.val_indices.split(self.options.batch_size):
            labels, tokens = self._batch(indices, 0)
            with self.trainer.autocast():
                metrics = self._metrics(labels, tokens)
            share = len(indices) / len(self.val_indices)
            for name, value in metrics.items():
                totals[f"val_{name}"] += share * float(value)
        return totals

    def _export(self, path: Path) -> None:
        metadata = {"data": describe(self.data), "seed": str(self.options.seed), "step": str(self.trainer.step)}
        # var.load() takes a folder with both networks.
        checkpoints.save(path.with_name(TOKENIZER_NAME), self.vqvae, {"source": str(self.options.tokenizer)})
        checkpoints.save(path, self.model, metadata)


def _with_class_names(config: VARConfig, data: ImageData) -> VARConfig:
    if config.num_classes != len(data.class_names):
        expected = f"{len(data.class_names)} (the classes of {data.name})"
        raise TrainingError(f"num_classes: expected {expected}, got {config.num_classes}")
    return config if config.class_names else dataclasses.replace(config, class_names=data.class_names)


def load_tokenizer(path: Path, backend: str = "auto") -> VQVAE:
    """The tokenizer of a file written by train_tokenizer, or of the run directory that holds it."""
    path = path / TOKENIZER_NAME if path.is_dir() else path
    model = checkpoints.load_model(path, backend)
    if not isinstance(model, VQVAE):
        raise TrainingError(f"tokenizer: expected the weights of a VQVAE in {path}, got {type(model).__name__}")
    return model


def _check_match(config: VARConfig, vqvae: VQVAE) -> None:
    for name in ("patch_nums", "vocab_size", "z_channels"):
        expected, got = getattr(vqvae.config, name), getattr(config, name)
        if tuple(np.atleast_1d(expected)) != tuple(np.atleast_1d(got)):
            raise TrainingError(f"{name}: expected {expected} (the tokenizer's), got {got}")


def cached_tokens(vqvae: VQVAE, data: ImageData, options: TransformerTraining) -> np.ndarray:
    """Tokens (views, N, L) of the whole data set, uint16 or int32. If the run directory has them, they are read.

    The name of the file contains a hash of all that the tokens depend on: the tokenizer, the images and the
    augmentation. So tokens of another tokenizer, or of images that were replaced since, are never used.
    """
    dtype = np.uint16 if vqvae.config.vocab_size <= 2**16 else np.int32
    shape = (options.views, len(data), vqvae.config.schedule.length)
    path = options.output / f"tokens-{_tokens_key(vqvae, data, options)}.npy"
    if path.exists():
        try:
            tokens = np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            tokens = None
        if tokens is not None and tokens.shape == shape and tokens.dtype == dtype:
            return tokens
    tokens = _tokenize(vqvae, data, options, np.empty(shape, dtype))
    _save_array(path, tokens)
    return tokens


def _tokens_key(vqvae: VQVAE, data: ImageData, options: TransformerTraining) -> str:
    tokenizer = {"weights": weights_hash(vqvae), "config": vqvae.config.to_dict()}
    augmentation = {name: getattr(options, name) for name in ("views", "random_crop", "flip", "seed", "skip_broken")}
    images = {"name": data.name, "files": data.fingerprint(), "images": len(data)}
    return hashlib.sha256(json.dumps([tokenizer, images, augmentation]).encode()).hexdigest()[:16]


def _tokenize(vqvae: VQVAE, data: ImageData, options: TransformerTraining, tokens: np.ndarray) -> np.ndarray:
    """Fills `tokens` (views, N, L)."""
    augmented = options.random_crop or options.flip
    batches = torch.arange(len(data)).split(options.encode_batch)
    total, number = options.views * len(batches), 0
    with TrainingDisplay("tokenizing", total) as display, torch.no_grad():
        for view in range(options.views):
            # One generator for all batches of a view, so that their size does not change the crops and flips.
            generator = step_generator(options.seed, view, _STREAM_VIEWS) if augmented else None
            for indices in batches:
                images = data.batch(indices, generator)[0].to(options.device)
                tokens[view, indices.numpy()] = vqvae.encode(images).cpu().numpy().astype(tokens.dtype)
                number += 1
                if number % 50 == 0 or number == total:
                    display.update(number, {"images": min(number * options.encode_batch, tokens[..., 0].size)})
    return tokens


def _save_array(path: Path, array: np.ndarray) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:  # np.save would append .npy to a name
            np.save(file, array)

    try:
        write_atomically(path, write)
    except OSError as error:
        raise TrainingError(f"could not write {path}: {error.strerror or error}") from error
