"""What attention and AdaLN blocks of several repositories have in common: what they compute alike, and refuse alike."""

from __future__ import annotations

import torch
from torch import nn

from ..block_causal_attention import MAX_HEAD_DIM
from .structure import hooks_of, layer_norm_difference


def head_dim_refusal(module: nn.Module) -> str | None:
    """Why our attention can't serve `module.head_dim`, None if it can."""
    if module.head_dim > MAX_HEAD_DIM:
        return f"head dimension {module.head_dim}, at most {MAX_HEAD_DIM} is supported"
    return None


def modulations(module: nn.Module, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The six modulations (B or 1, 1, C) of a block: two gates, two scales, two shifts.

    The condition is that of the block's own linear layer or, for a shared AdaLN, the six modulations of all blocks.
    """
    six = module.ada_gss + condition if module.shared_aln else module.ada_lin(condition).view(-1, 1, 6, module.C)
    return six.unbind(2)


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
