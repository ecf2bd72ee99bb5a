"""AdaLN-modulated LayerNorm, with and without the gated residual sum in front: the specification."""

import torch


def adaln_layer_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """`LN(x) * (1 + scale) + shift` over the last dimension of x (B, L, C), in fp32 (fp64 for fp64), rounded once."""
    h = _widen(x)
    centred = h - h.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normalised * (1 + _modulation(scale)) + _modulation(shift)).to(x.dtype)


def gated_residual_adaln(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual = x + gate * branch`, and `adaln_layer_norm(residual, scale, shift)`.

    The first is rounded to the dtype of x, the second to that of branch. The norm is that of the rounded residual.
    """
    residual = (_widen(x) + _modulation(gate) * _widen(branch)).to(x.dtype)
    return residual, adaln_layer_norm(residual, scale, shift, eps=eps).to(branch.dtype)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _modulation(tensor: torch.Tensor) -> torch.Tensor:
    """(B, C), (B, 1, C), (1, 1, C) or (B, L, C) -> broadcastable to (B, L, C)."""
    return _widen(tensor if tensor.dim() == 3 else tensor.unsqueeze(1))
