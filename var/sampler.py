"""The loop from labels to images: classifier-free guidance, sampling, and the scales one after the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from var_kernels import sample_tokens
from var_kernels.reference.sample_tokens import guide, restrict

from .inference import PRECISIONS, InferenceDecoder, InferenceTransformer
from .transformer import VAR
from .vqvae import VQVAE


class Generated(NamedTuple):
    """Result of a generation."""

    tokens: Tensor  # (B, L) int64, as sampled
    images: Tensor  # (B, 3, H, W) in [−1, 1]


class Kept(NamedTuple):
    """Given tokens that editing keeps: `tokens` (B, L) and, per scale, a mask (l_k,) that is True where they stay."""

    tokens: Tensor
    masks: tuple[Tensor, ...]


OnScale = Callable[[int, Callable[[], Tensor]], None]


def soft_codes(logits_BLV: Tensor, codebook_VC: Tensor, ratio: float, exponential_BLV: Tensor) -> Tensor:
    """`more_smooth`: codes averaged with Gumbel-softmax weights, sharper from scale to scale (ratio = k/(K−1))."""
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    weights = ((logits_BLV * (1 + ratio) - exponential_BLV.log()) / temperature).softmax(dim=-1)
    return weights @ codebook_VC


@functools.cache
def _exponential_composes() -> bool:
    """Whether `exponential_` on a CPU is −log1p(−u) of the doubles of `uniform_`, as in PyTorch's plain kernel."""
    expected = torch.empty(4099).exponential_(generator=torch.Generator().manual_seed(1))
    drawn = torch.empty(4099, dtype=torch.float64).uniform_(generator=torch.Generator().manual_seed(1))
    return torch.equal(drawn.neg_().log1p_().neg_().float(), expected)


def fill_exponential(out: Tensor, generator: torch.Generator) -> None:
    """`out.exponential_(generator=generator)` of a dense tensor, number for number; on a CPU in a quarter of the time.

    PyTorch draws and takes the logarithm one number after the other; only drawing has to be so.
    """
    if out.device.type != "cpu" or out.dtype != torch.float32 or not _exponential_composes():
        out.exponential_(generator=generator)
        return
    buffer = torch.empty(min(out.numel(), 1 << 17), dtype=torch.float64)  # 1 MiB: stays in the cache
    for part in out.view(-1).split(1 << 17):
        drawn = buffer[: len(part)].uniform_(generator=generator)
        part.copy_(drawn.neg_().log1p_().neg_())


class _Noise:
    """Exp(1) variates, (B, l, V) for one scale after the other, from one generator or one for each image."""

    def __init__(self, batch: int, vocab: int, device: torch.device, seed: int | None, seeds: Tensor | None) -> None:
        self._shape, self._device = (batch, vocab), device
        if seeds is not None:
            self._generators = [torch.Generator(device).manual_seed(int(value)) for value in seeds]
            return
        generator = torch.Generator(device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        self._generators = [generator]

    def draw(self, length: int) -> Tensor:
        batch, vocab = self._shape
        noise = torch.empty(batch, length, vocab, device=self._device)
        for part, generator in zip(noise.chunk(len(self._generators)), self._generators, strict=True):
            fill_exponential(part, generator)
        return noise


class Generator:
    """Images of a model, as fast as the machine allows: built once for a precision and a batch size, called often.

    Building copies the weights as they are now, packed for oneDNN on a CPU and the decoder's with its channels last;
    `nbytes` says how much that is, with the KV cache. Later changes of the model do not show. With `pack=False` nothing
    is copied in fp32: projections are `F.linear`, and the model's own decoder runs. Precision "bf16" holds weights,
    activations of the projections, attention and the decoder in bfloat16; the residual stream, the norms, the head
    and sampling stay fp32.

    Raises ValueError for an unknown precision, a batch size below 1 and a VQ-VAE of another schedule, vocabulary or
    width than the transformer's.
    """

    def __init__(
        self, var: VAR, vqvae: VQVAE, *, batch_size: int = 1, precision: str = "fp32", pack: bool = True
    ) -> None:
        for name in ("patch_nums", "vocab_size", "z_channels"):
            ours, theirs = getattr(var.config, name), getattr(vqvae.config, name)
            if ours != theirs:
                raise ValueError(f"vqvae: expected {name} {ours} like the transformer, got {theirs}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.config, self.batch_size, self.precision = var.config, batch_size, precision
        self._device = var.pos_1LC.device
        self._backend = var.backend
        self._condition = var.condition
        self._quantize = vqvae.quantize
        with torch.inference_mode():
            self._transformer = InferenceTransformer(var, 2 * batch_size, PRECISIONS[precision], pack=pack)
            in_place = precision == "fp32" and not pack
            self._decoder = None if in_place else InferenceDecoder(vqvae, PRECISIONS[precision])
            self._decode = self._decoder or vqvae.decode_features

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that this object holds beside the model: packed weights, the decoder's copy, the KV cache."""
        return {
            "packed weights": self._transformer.packed_bytes, "decoder": self._decoder.nbytes if self._decoder else 0,
            "KV cache": self._transformer.cache_bytes,
        }  # fmt: skip

    def stream(self, labels: Tensor, *, seeds: Sequence[int] | Tensor | None = None, **options) -> Iterator[Generated]:
        """Generate any number of images, `batch_size` at a time, each group as soon as it is ready.

        `seeds` has one seed for each label; options are those of a call. One `seed` is refused: groups would repeat
        each other.
        """
        if "seed" in options:
            raise ValueError("seed: expected seeds, one for each image, got one seed for all groups")
        for start in range(0, len(labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self(labels[part], seeds=None if seeds is None else seeds[part], **options)

    @torch.inference_mode()
    def __call__(
        self, labels: Tensor, *, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0, seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None, more_smooth: bool = False, keep: Kept | None = None,
        on_scale: OnScale | None = None,
    ) -> Generated:
        """One image for each of up to `batch_size` labels; the options are those of `generate`."""
        _check_options(cfg, top_k, top_p)
        labels = labels.to(self._device)
        batch, config = len(labels), self.config
        if batch > self.batch_size:
            raise ValueError(f"labels: expected at most batch_size = {self.batch_size}, got {batch}")
        seeds = _checked_seeds(seeds, seed, batch)
        with torch.autocast(self._device.type, enabled=False):
            guided = cfg > 0
            if guided:
                labels = torch.cat((labels, torch.full_like(labels, config.num_classes)))
            self._condition(labels)  # refuses bad labels
            f_hat = self._quantize.empty_features(batch)
            if batch == 0:
                return Generated(labels.new_zeros(0, config.schedule.length), self._decode(f_hat))
            # Seeds serve the kernel's own generator; `more_smooth` needs the numbers themselves.
            noise = None
            if seeds is None or more_smooth:
                noise = _Noise(batch, config.vocab_size, self._device, seed, seeds)
            x_BLC, sampled = self._transformer.begin(labels), []
            for k, (start, length) in enumerate(zip(config.schedule.starts, config.schedule.lengths, strict=True)):
                ratio = k / (config.schedule.num_scales - 1) if config.schedule.num_scales > 1 else 0.0
                logits = self._transformer.step(x_BLC, k)
                conditional, unconditional = logits.chunk(2) if guided else (logits, None)
                draw = {"noise": noise.draw(length)} if noise else {"seeds": seeds.to(self._device), "offset": start}
                tokens = sample_tokens(
                    conditional, unconditional, guidance=cfg * ratio, top_k=top_k, top_p=top_p, backend=self._backend,
                    **draw,
                )
                sampled.append(tokens)
                codes = self._quantize.embedding(tokens)
                if more_smooth:
                    mixed = guide(conditional, unconditional, cfg * ratio) if guided else conditional
                    codes = soft_codes(
                        restrict(mixed, top_k, top_p), self._quantize.embedding.weight, ratio, noise.draw(length)
                    )
                if keep is not None:
                    given = self._quantize.embedding(keep.tokens[:, start : start + length])
                    codes = torch.where(keep.masks[k].view(1, -1, 1), given, codes)
                f_hat, following = self._quantize.accumulate(f_hat, codes, k)
                if on_scale is not None:
                    on_scale(k, lambda features=f_hat: self._decode(features))
                if following is not None:
                    x_BLC = self._transformer.embed(following, k + 1, guided)
            return Generated(torch.cat(sampled, dim=1), self._decode(f_hat))


def _check_options(cfg: float, top_k: int, top_p: float) -> None:
    if not cfg >= 0 or cfg == float("inf"):
        raise ValueError(f"cfg: expected a finite number ≥ 0, got {cfg}")
    if top_k < 0:
        raise ValueError(f"top_k: expected an integer ≥ 0 (0: off), got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: expected a number in [0, 1] (0: off), got {top_p}")


def _checked_seeds(seeds: Sequence[int] | Tensor | None, seed: int | None, batch: int) -> Tensor | None:
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


def generate(
    var: VAR, vqvae: VQVAE, labels: Tensor, *, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0,
    seed: int | None = None, seeds: Sequence[int] | Tensor | None = None, more_smooth: bool = False,
    keep: Kept | None = None, on_scale: OnScale | None = None, precision: str | None = None, pack: bool = True,
) -> Generated:
    """Sample one image per label, coarse to fine. This builds a `Generator`; for more than one call keep one.

    Guidance grows with the scale: t = cfg·k/(K−1); with cfg = 0 the unconditional half is not computed. One
    `torch.Generator` is seeded with `seed` (fresh entropy if None) and drawn from once per scale, so a seed gives the
    tokens of the official implementation. With `seeds`, one for each label, an image depends on its own seed and not
    on its neighbours. `more_smooth` feeds Gumbel-softmax mixtures of codes forward (nicer pictures, no valid
    likelihood); `keep` holds tokens that editing keeps. `on_scale(k, partial)` is called after each scale; `partial()`
    decodes the images (B, 3, H, W) so far.

    `precision` is "fp32" or "bf16"; None: bf16 under bf16 autocast, else fp32. `pack` as in `Generator`.

    Raises ValueError for labels outside [0, num_classes], top_p outside [0, 1], negative cfg or top_k, and a VQ-VAE
    of another schedule, vocabulary or width.
    """
    device = var.pos_1LC.device.type
    if precision is None:
        low = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        precision = "bf16" if low else "fp32"
    generator = Generator(var, vqvae, batch_size=max(1, len(labels)), precision=precision, pack=pack)
    return generator(
        labels, cfg=cfg, top_k=top_k, top_p=top_p, seed=seed, seeds=seeds, more_smooth=more_smooth, keep=keep,
        on_scale=on_scale,
    )
