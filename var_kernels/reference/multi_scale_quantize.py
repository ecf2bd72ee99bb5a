"""The multi-scale residual quantizer of VAR (arXiv 2404.02905, algorithms 1 and 2): the specification."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .nearest_code import nearest_code


def phi_index(k: int, num_scales: int, num_phi: int) -> int:
    """The index of the shared convolution, of `num_phi`, that scale `k` (from 0) of `num_scales` uses.

    It is the first minimum of |tick - k / (num_scales - 1)| in float64 over n = `num_phi` evenly spaced ticks. They run
    from 1/(3n) to 1 - 1/(3n) for n = 4 and from 1/(2n) to 1 - 1/(2n) otherwise. A single scale has position 0.
    """
    margin = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    start, stop = margin, 1 - margin
    step = (stop - start) / max(num_phi - 1, 1)
    # The last tick is `stop` itself, as in numpy.linspace: i * step + start may miss it by one rounding, and such
    # roundings decide ties between ticks.
    ticks = [i * step + start for i in range(num_phi - 1)] + [stop if num_phi > 1 else start]
    position = k / max(num_scales - 1, 1)
    distances = [abs(tick - position) for tick in ticks]
    return distances.index(min(distances))


def _phi(code_map: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ratio: float) -> torch.Tensor:
    return (1 - ratio) * code_map + ratio * F.conv2d(code_map, weight, bias, padding=1)


def _upsample(codes: torch.Tensor, size: tuple[int, int], full: tuple[int, int]) -> torch.Tensor:
    """The codes (B, h, w, C) of a map of `size`, upsampled to (B, C, H, W) by bicubic interpolation."""
    code_map = codes.permute(0, 3, 1, 2)
    return code_map if size == full else F.interpolate(code_map, size=full, mode="bicubic", align_corners=False)


def _pool(full_map: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The map (B, C, H, W), area-pooled to `size`, with its channels last: (B, h, w, C)."""
    pooled = full_map if size == tuple(full_map.shape[-2:]) else F.interpolate(full_map, size=size, mode="area")
    return pooled.permute(0, 2, 3, 1)


def multi_scale_quantize(
    f: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    phi_ratio: float = 0.5,
    metric: str = "l2",
    beta: float = 0.25,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens (B, L), f_hat (B, C, H, W) and the loss; see var_kernels.multi_scale_quantize."""
    dtype = f.dtype
    if dtype != torch.float64:
        f, codebook, phi_weight, phi_bias = f.float(), codebook.float(), phi_weight.float(), phi_bias.float()
    full = tuple(f.shape[-2:])
    target = f.detach()
    rest, f_hat, loss, tokens = target, torch.zeros_like(target), 0.0, []
    for k, size in enumerate(sizes):
        scale_tokens = nearest_code(_pool(rest, size), codebook.detach(), metric=metric)
        i = phi_index(k, len(sizes), phi_weight.shape[0])
        h = _phi(_upsample(codebook[scale_tokens], size, full), phi_weight[i], phi_bias[i], phi_ratio)
        f_hat = f_hat + h
        rest = rest - h.detach()
        loss = loss + beta * F.mse_loss(f_hat.detach(), f) + F.mse_loss(f_hat, target)
        tokens.append(scale_tokens.flatten(1))
    straight_through = f_hat.detach() + (f - target)
    return torch.cat(tokens, dim=1), straight_through.to(dtype), loss / len(sizes)


@torch.no_grad()
def next_scale_input(
    f_hat: torch.Tensor,
    codes: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    k: int,
    *,
    phi_ratio: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The new f_hat (B, C, H, W) and the next map (B, l, C); see var_kernels.next_scale_input."""
    dtype = f_hat.dtype
    if dtype != torch.float64:
        f_hat, codes, phi_weight, phi_bias = f_hat.float(), codes.float(), phi_weight.float(), phi_bias.float()
    i = phi_index(k, len(sizes), phi_weight.shape[0])
    code_map = _upsample(codes.unflatten(1, sizes[k]), sizes[k], tuple(f_hat.shape[-2:]))
    new_f_hat = f_hat + _phi(code_map, phi_weight[i], phi_bias[i], phi_ratio)
    if k + 1 == len(sizes):
        return new_f_hat.to(dtype), None
    return new_f_hat.to(dtype), _pool(new_f_hat, sizes[k + 1]).flatten(1, 2).to(dtype)
