"""Zero-shot editing: in-painting, out-painting and class-conditional editing, which keep some of an image's tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.config import ScaleSchedule
from ..model.modules import dtype_of
from ..model.transformer import VAR
from ..model.vqvae import VQVAE
from .generator import generate
from .request import Generated, Kept

_ALWAYS_KEPT = 3  # maps of at most 3 tokens carry the global layout, so their tokens are always kept


def box_mask(schedule: ScaleSchedule, box: tuple[float, float, float, float], *, inside: bool) -> Tensor:
    """Mask (side, side) of the last map, in which 1 keeps the given token.

    `box` is (y0, x0, y1, x1) in fractions of the side. `inside=True` keeps the box (out-painting), `inside=False` keeps
    its surroundings (in-painting, class edit).
    """
    y0, x0, y1, x1 = box
    if not (0 <= y0 <= y1 <= 1 and 0 <= x0 <= x1 <= 1):
        raise ValueError(f"box: expected 0 ≤ y0 ≤ y1 ≤ 1 and 0 ≤ x0 ≤ x1 ≤ 1, got {box}")
    side = schedule.side
    mask = torch.zeros(side, side)
    mask[round(y0 * side) : round(y1 * side), round(x0 * side) : round(x1 * side)] = 1
    return mask if inside else 1 - mask


def kept_masks(schedule: ScaleSchedule, mask: Tensor) -> tuple[Tensor, ...]:
    """The mask of every scale as bool (l_k,): `mask`, resized bilinearly, is True where it is greater than 0.5."""
    if tuple(mask.shape) != (schedule.side, schedule.side):
        raise ValueError(f"mask: expected shape {(schedule.side, schedule.side)}, got {tuple(mask.shape)}")
    masks = []
    for side, length in zip(schedule.patch_nums, schedule.lengths, strict=True):
        resized = F.interpolate(mask[None, None].float(), size=(side, side), mode="bilinear", align_corners=False)
        masks.append(torch.ones_like(resized.flatten(), dtype=torch.bool)
                     if length <= _ALWAYS_KEPT else resized.flatten() > 0.5)
    return tuple(masks)


def edit(var: VAR, vqvae: VQVAE, images: Tensor, mask: Tensor, labels: Tensor | None = None, *,
         backend: str | None = None, **options) -> Generated:  # fmt: skip
    """Generate new tokens where `mask` (side, side) is 0 and keep the tokens of the images elsewhere.

    images is (B, 3, H, W) in [−1, 1]. labels is (B,) for a class edit. None, for in- and out-painting, means the
    unconditional class. `backend` and the options are those of `var.generate`. The returned tokens are the sampled
    ones, before the kept tokens replace them.
    """
    masks = tuple(part.to(images.device) for part in kept_masks(var.config.schedule, mask))
    if labels is None:
        labels = torch.full((len(images),), var.config.num_classes, device=images.device)
    tokens = vqvae.encode(images.to(dtype_of(vqvae.encoder)), backend)
    return generate(var, vqvae, labels, keep=Kept(tokens, masks), backend=backend, **options)
