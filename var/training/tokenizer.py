"""Training of the multi-scale VQ-VAE (the tokenizer), with measures that keep its codes in use.

The loss is ``mse + l1_weight·l1 + vq_weight·vq_loss``. There is no perceptual or adversarial term, so training needs
nothing but images; the price is slightly soft texture.

Vector quantization with a plain loss uses a small part of its codebook: a code that no vector picks gets no gradient
and stays dead. `CodebookCare` takes two measures against this. The codes start as cluster centres of the features of
the untrained encoder. And in the first part of the training, codes that are no longer used move to where the error is
large.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.interface import batch_indices, describe, step_generator
from ..evaluation.metrics import psnr, used_codes
from ..model import checkpoints
from ..model.config import VQVAEConfig
from ..model.vqvae import VQVAE
from .data import open_training_data
from .options import TrainingOptions, TrainingResult
from .trainer import Trainer, only_training, plain

WEIGHTS_NAME = "vqvae.safetensors"
_STREAM_AUGMENT, _STREAM_CODEBOOK = 2, 3


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining(TrainingOptions):
    """Options of `train_tokenizer`."""

    model: VQVAEConfig
    l1_weight: float = 0.2
    vq_weight: float = 1.0
    random_crop: bool = False  # folders of images only
    flip: bool = False  # folders of images only
    init_images: int = 256  # images whose features are clustered into the first codebook
    restart_every: int = 50  # steps between revivals of dead codes
    restart_until: float = 0.7  # fraction of max_steps after which dead codes are not revived any more
    restart_threshold: float = 0.1  # a code is dead below this fraction of the mean number of hits


def train_tokenizer(options: TokenizerTraining) -> TrainingResult:
    """Trains a tokenizer and writes ``checkpoint.pt``, ``log.jsonl`` and ``vqvae.safetensors`` to `options.output`.

    Raises `var.data.DataError` for unusable data, and `var.training.options.TrainingError` if training cannot start or
    go on.
    """
    with only_training(options.output), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return _TokenizerRun(options).run()


class _TokenizerRun:
    def __init__(self, options: TokenizerTraining) -> None:
        config = options.model
        (self.data, self.train_indices, self.val_indices), options = open_training_data(options, config.image_size)
        self.options = options
        self.vqvae = VQVAE(config, options.backend).to(options.device)
        hits = torch.zeros(config.vocab_size, device=options.device)
        self.trainer = Trainer(
            self.vqvae,
            options,
            title="tokenizer",
            config=plain(config.to_dict()),
            tokens_per_image=config.schedule.length,
            extra={"code_hits": hits},
            data=self.data,
        )
        self.care = CodebookCare(self.vqvae, self.trainer, hits)
        self.images: Tensor | None = None  # those of the newest step, which the revival of codes looks at

    def run(self) -> TrainingResult:
        if self.trainer.step == 0:
            first = batch_indices(self.train_indices, self._init_count(), self.options.seed, 0)
            self.care.initialise(self._batch(first, 0), step_generator(self.options.seed, 0, _STREAM_CODEBOOK))
        return self.trainer.fit(
            self._loss,
            weights=self.options.output / WEIGHTS_NAME,
            export=self._export,
            after_step=self._after_step,
            validate=self._validate if len(self.val_indices) else None,
        )

    def _init_count(self) -> int:
        return min(self.options.init_images, len(self.train_indices))

    def _batch(self, indices: Tensor, step: int, augment: bool = True) -> Tensor:
        generator = step_generator(self.options.seed, step, _STREAM_AUGMENT) if augment else None
        return self.data.batch(indices, generator)[0].to(self.options.device)

    def _loss(self, step: int) -> dict[str, Tensor]:
        options = self.options
        self.images = self._batch(batch_indices(self.train_indices, options.batch_size, options.seed, step), step)
        reconstruction, vq_loss, tokens = self.vqvae(self.images)
        reconstruction = reconstruction.float()
        mse, l1 = F.mse_loss(reconstruction, self.images), F.l1_loss(reconstruction, self.images)
        self.care.count(tokens)
        loss = mse + options.l1_weight * l1 + options.vq_weight * vq_loss
        return {"loss": loss, "mse": mse, "l1": l1, "vq": vq_loss, "codes": self.care.used_fraction()}

    def _after_step(self, step: int) -> None:
        options = self.options
        if step % options.restart_every == 0 and step <= options.restart_until * options.max_steps:
            self.care.revive(self.images, step_generator(options.seed, step, _STREAM_CODEBOOK))

    def _validate(self) -> dict[str, float]:
        values, hits = [], torch.zeros(self.options.model.vocab_size, dtype=torch.int64)
        for indices in self.val_indices.split(self.options.batch_size):
            # In fp32 for every precision of the training, because the tokenizer is used in fp32.
            images = self._batch(indices, 0, augment=False)
            reconstruction, _, tokens = self.vqvae(images)
            values.append(psnr(reconstruction, images).cpu())
            hits += tokens.flatten().bincount(minlength=len(hits)).cpu()
        return {"val_psnr": float(torch.cat(values).mean()), "val_codes": used_codes(hits)}

    def _export(self, path: Path) -> None:
        checkpoints.save(
            path,
            self.vqvae,
            {"data": describe(self.data), "seed": str(self.options.seed), "step": str(self.trainer.step)},
        )


class CodebookCare:
    """Keeps the codes of a multi-scale tokenizer in use.

    `hits` (V,) is a running mean of how often each code is picked in a batch, relative to the mean over all codes: a
    code that is picked as often as the average has 1.
    """

    _MOMENTUM = 0.98

    def __init__(self, vqvae: VQVAE, trainer: Trainer, hits: Tensor) -> None:
        self.vqvae, self.trainer, self.hits = vqvae, trainer, hits
        name = "quantize.embedding.weight"
        self.codebook = trainer.parameters[name]  # (V, C)
        self.averaged_codebook = trainer.ema.get(name)

    @torch.no_grad()
    def count(self, tokens: Tensor) -> None:
        """Adds the picks of one batch of tokens (B, L) to the running mean."""
        picked = tokens.flatten().bincount(minlength=len(self.hits)).to(self.hits)
        self.hits.lerp_(picked * (len(self.hits) / tokens.numel()), 1 - self._MOMENTUM)

    def used_fraction(self) -> Tensor:
        """Fraction of the codes that are not dead, which means that they reach `restart_threshold`."""
        return (self.hits >= self.trainer.options.restart_threshold).float().mean()

    @torch.no_grad()
    def initialise(self, images: Tensor, generator: torch.Generator, iterations: int = 6) -> None:
        """Make the first codebook by Lloyd's algorithm on the vectors that the quantizer looks up.

        Empty clusters move to vectors with large errors.

        The vectors of later scales are residuals, so they depend on the codes and are recomputed in every iteration.
        """
        pooled = self._pooled_features(images).flatten(0, 1)
        chosen = torch.randint(len(pooled), (len(self.codebook),), generator=generator)
        self.codebook.copy_(pooled[chosen.to(pooled.device)])
        for _ in range(iterations):
            queries, tokens = self._queries(images)
            counts = tokens.bincount(minlength=len(self.codebook))
            sums = torch.zeros_like(self.codebook).index_add_(0, tokens, queries)
            alive = counts > 0
            self.codebook[alive] = (sums[alive] / counts[alive, None]).to(self.codebook.dtype)
            self._move(~alive, queries, tokens, generator)
        self.hits.fill_(1.0)
        if self.averaged_codebook is not None:
            self.averaged_codebook.copy_(self.codebook)

    @torch.no_grad()
    def revive(self, images: Tensor, generator: torch.Generator) -> int:
        """Moves every dead code onto a vector of `images` with a large error. Returns how many codes moved."""
        dead = self.hits < self.trainer.options.restart_threshold
        count = int(dead.sum())
        if count:
            queries, tokens = self._queries(images)
            self._move(dead, queries, tokens, generator)
            # With average hits, a moved code has some batches in which to be picked before it can count as dead again.
            self.hits[dead] = 1.0
            for moment in ("exp_avg", "exp_avg_sq"):
                if self.codebook in self.trainer.optimizer.state:
                    self.trainer.optimizer.state[self.codebook][moment][dead] = 0.0
            if self.averaged_codebook is not None:
                self.averaged_codebook[dead] = self.codebook[dead]
        return count

    def _move(self, rows: Tensor, queries: Tensor, tokens: Tensor, generator: torch.Generator) -> None:
        """Sets codebook[rows] to queries, drawn with probability ∝ squared quantization error, plus 1 % noise."""
        count = int(rows.sum())
        if count == 0:
            return
        error = (queries - self.codebook[tokens]).square().sum(1).double().cpu()
        # Only toy data has fewer vectors than codes. Vectors are then drawn repeatedly, and their noise differs.
        weights = error + error.mean() * 1e-3 + 1e-30
        chosen = torch.multinomial(weights, count, replacement=count > len(weights), generator=generator)
        vectors = queries[chosen.to(queries.device)]
        noise = torch.randn(vectors.shape, generator=generator).to(vectors)
        self.codebook[rows] = (vectors + 0.01 * vectors.std() * noise).to(self.codebook.dtype)

    def _pooled_features(self, images: Tensor) -> Tensor:
        """Encoder features pooled to every scale: (B, L, C) float32."""
        features = self.vqvae.features(images).float()
        sides = self.vqvae.config.patch_nums
        return torch.cat([F.adaptive_avg_pool2d(features, side).flatten(2).mT for side in sides], 1)

    def _queries(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B·L, C) that the quantizer looks up at all scales, and the codes (B·L,) that it finds.

        The query of scale k is the pooled residual. Pooling is linear, so the query is pool(f) − pool(f_hat of the
        earlier scales), and the second term is exactly the teacher-forcing input of scale k.
        """
        pooled = self._pooled_features(images)
        tokens = self.vqvae.encode(images)
        first = self.vqvae.config.schedule.lengths[0]
        pooled[:, first:] -= self.vqvae.teacher_forcing_input(tokens).to(pooled)
        return pooled.flatten(0, 1), tokens.flatten()

