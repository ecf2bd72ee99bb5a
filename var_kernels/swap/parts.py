"""What the AdaLN blocks of several repositories have in common: a norm without weights, and stochastic depth."""

from __future__ import annotations

import torch
from torch import nn

from .structure import hooks_of, layer_norm_difference


def with_drop_path(module: nn.Module, gate: torch.Tensor, samples: int, dtype: torch.dtype) -> torch.Tensor:
    """The gate times the factor of each sample by which `module.drop_path` multiplies a branch of this dtype."""
    if not module.training or not getattr(module.drop_path, "drop_prob", 0.0):
        return gate
    return gate * module.drop_path(gate.new_ones((samples, 1, 1), dtype=dtype))


def norm_refusal(module: nn.Module) -> str | None:
    """Why `module.ln_wo_grad` is not the norm of our ops, None if it is."""
    return layer_norm_difference(module, "ln_wo_grad")


def drop_path_refusal(module: nn.Module) -> str | None:
    """Why `module.drop_path` can't become a factor of the gate, None if it can."""
    drop_path = module.drop_path
    name = type(drop_path).__name__
    if not isinstance(drop_path, nn.Identity) and not (name == "DropPath" and hasattr(drop_path, "drop_prob")):
        return f"drop_path: expected nn.Identity or DropPath, got {name}"
    return hooks_of(module, "drop_path")
