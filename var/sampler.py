"""Sampling: classifier-free guidance, top-k, top-p, and the loop over scales with a KV cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .transformer import VAR
from .vqvae import VQVAE


class Generated(NamedTuple):
    """Result of `generate`."""

    tokens: Tensor  # (B, L) int64, as sampled
    images: Tensor  # (B, 3, H, W) in [−1, 1]


class Kept(NamedTuple):
    """Given tokens that editing keeps: `tokens` (B, L) and, per scale, a mask (l_k,) that is True where they stay."""

    tokens: Tensor
    masks: tuple[Tensor, ...]


def guide(logits_2BLV: Tensor, strength: float) -> Tensor:
    """Classifier-free guidance: (1 + t)·conditional − t·unconditional; the batch holds both, conditional first."""
    conditional, unconditional = logits_2BLV.chunk(2)
    return (1 + strength) * conditional - strength * unconditional


def restrict(logits_BLV: Tensor, top_k: int, top_p: float) -> Tensor:
    """−inf outside the top_k largest logits, then outside the smallest set whose probability exceeds top_p.

    0 switches either off. Ties with the k-th largest logit all stay; the most likely token always stays.
    """
    if 0 < top_k < logits_BLV.shape[-1]:
        threshold = logits_BLV.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits_BLV = logits_BLV.masked_fill(logits_BLV < threshold, -torch.inf)
    if top_p > 0:
        ascending, order = logits_BLV.sort(dim=-1, descending=False)
        unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        unlikely[..., -1:] = False
        logits_BLV = logits_BLV.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)
    return logits_BLV


def draw(logits_BLV: Tensor, generator: torch.Generator) -> Tensor:
    """One token (B, L) per position from the softmax of the logits."""
    probabilities = logits_BLV.softmax(dim=-1)
    return torch.multinomial(probabilities.flatten(0, -2), 1, replacement=True, generator=generator).view(
        logits_BLV.shape[:-1]
    )


def soft_codes(logits_BLV: Tensor, codebook_VC: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """`more_smooth`: codes averaged with Gumbel-softmax weights, sharper from scale to scale (ratio = k/(K−1))."""
    temperature = max(0.27 * (1 - 0.95 * ratio), 0.005)
    noise = -torch.empty_like(logits_BLV).exponential_(generator=generator).log()
    weights = ((logits_BLV * (1 + ratio) + noise) / temperature).softmax(dim=-1)
    return weights @ codebook_VC


def _check_options(var: VAR, vqvae: VQVAE, cfg: float, top_k: int, top_p: float) -> None:
    for name in ("patch_nums", "vocab_size", "z_channels"):
        ours, theirs = getattr(var.config, name), getattr(vqvae.config, name)
        if ours != theirs:
            raise ValueError(f"vqvae: expected {name} {ours} like the transformer, got {theirs}")
    if not cfg >= 0 or cfg == float("inf"):
        raise ValueError(f"cfg: expected a finite number ≥ 0, got {cfg}")
    if top_k < 0:
        raise ValueError(f"top_k: expected an integer ≥ 0 (0: off), got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p: expected a number in [0, 1] (0: off), got {top_p}")


@torch.inference_mode()
def generate(
    var: VAR, vqvae: VQVAE, labels: Tensor, *, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0,
    seed: int | None = None, more_smooth: bool = False, keep: Kept | None = None,
    on_scale: Callable[[int, Tensor], None] | None = None,
) -> Generated:
    """Sample one image per label, coarse to fine.

    Guidance grows with the scale: t = cfg·k/(K−1); with cfg = 0 the unconditional half is not computed. One
    `torch.Generator` is seeded with `seed` (fresh entropy if None) and drawn from once per scale, so a seed gives the
    tokens of the official implementation. `more_smooth` feeds Gumbel-softmax mixtures of codes forward (nicer
    pictures, no valid likelihood); `keep` holds tokens that editing keeps. `on_scale(k, f_hat)` is called after each
    scale with the features so far (B, z_channels, h, w), which `vqvae.decode_features` turns into an image.

    Raises ValueError for labels outside [0, num_classes], top_p outside [0, 1], negative cfg or top_k, and a VQ-VAE
    of another schedule, vocabulary or width.
    """
    _check_options(var, vqvae, cfg, top_k, top_p)
    schedule, batch = var.config.schedule, len(labels)
    device = var.pos_1LC.device
    labels = labels.to(device)
    generator = torch.Generator(device)
    generator.seed() if seed is None else generator.manual_seed(seed)
    guided = cfg > 0
    if guided:
        labels = torch.cat((labels, torch.full_like(labels, var.config.num_classes)))
    cond_BD = var.condition(labels)
    f_hat = vqvae.quantize.empty_features(batch)
    if batch == 0:
        return Generated(labels.new_zeros(0, schedule.length), vqvae.decode_features(f_hat))
    modulations, positions, caches = var.modulations(cond_BD), var.positions(), var.new_caches(len(labels))
    codebook = vqvae.quantize.embedding
    x_BLC, sampled = var.start(cond_BD), []
    for k, (start, length) in enumerate(zip(schedule.starts, schedule.lengths, strict=True)):
        ratio = k / (schedule.num_scales - 1) if schedule.num_scales > 1 else 0.0
        logits_BLV = var.step(x_BLC + positions[:, start : start + length], modulations, caches, k)
        logits_BLV = restrict(guide(logits_BLV, cfg * ratio) if guided else logits_BLV, top_k, top_p)
        tokens = draw(logits_BLV, generator)
        sampled.append(tokens)
        codes = soft_codes(logits_BLV, codebook.weight, ratio, generator) if more_smooth else codebook(tokens)
        if keep is not None:
            given = codebook(keep.tokens[:, start : start + length])
            codes = torch.where(keep.masks[k].view(1, -1, 1), given, codes)
        f_hat, following = vqvae.quantize.accumulate(f_hat, codes, k)
        if on_scale is not None:
            on_scale(k, f_hat)
        if following is not None:
            x_BLC = var.word_embed(following)
            x_BLC = torch.cat((x_BLC, x_BLC)) if guided else x_BLC
    return Generated(torch.cat(sampled, dim=1), vqvae.decode_features(f_hat))
