"""The process of `python -m var_kernels.swap check` for one block of VAR: sizes block512 and block1024."""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import torch
from torch import nn

from ..native.build import replace_unprintable
from .checkout import Rows, Step, answer, gradients_of, paired, peak_of

# The sides of the token maps, and the width: VAR-d36 at 512 pixels, and a model of d16's width at 1024 pixels.
SIZES = {
    "block512": ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 2304),
    "block1024": ((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64), 1024),
}


class Inputs(NamedTuple):
    """A block, and what its forward takes in training."""

    block: nn.Module
    x: torch.Tensor
    condition: torch.Tensor
    bias: torch.Tensor


def make(path: str, size: str) -> Inputs:
    """A block of the checkout with random weights, and random inputs beside the float mask of the schedule."""
    sys.path.insert(0, path)
    from models.basic_var import AdaLNSelfAttn  # the checkout's

    patch_nums, width = SIZES[size]
    torch.manual_seed(0)
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    block = AdaLNSelfAttn(
        block_idx=0, last_drop_p=0, embed_dim=width, cond_dim=width, shared_aln=False, norm_layer=norm,
        num_heads=width // 64, attn_l2_norm=True,
    )  # fmt: skip
    level = torch.cat([torch.full((side * side,), i) for i, side in enumerate(patch_nums)])
    bias = torch.where(level[:, None] >= level, 0.0, -torch.inf)[None, None].contiguous()
    return Inputs(block.train(), torch.randn(1, len(level), width), torch.randn(1, width), bias)


def _step(inputs: Inputs, dtype: torch.dtype) -> Step:
    """The output, its mean square and the gradients of a training step, with autocast to `dtype` unless it is fp32."""
    block = inputs.block
    block.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = block(inputs.x.to(dtype), inputs.condition.to(dtype), inputs.bias.to(dtype))
    loss = out.float().square().mean()
    loss.backward()
    return Step(out.detach().float(), loss.detach(), gradients_of(block))


def compare(inputs: Inputs, batch: int, seconds: float) -> dict:
    """The rows of the table, and the report of the swap."""
    rows = Rows()
    exact = _step(inputs, torch.float32)
    before, after, times = paired(inputs.block, lambda: _step(inputs, torch.bfloat16), seconds)
    name = f"training step, L {inputs.x.shape[1]}, width {inputs.x.shape[2]}, bf16 autocast"
    rows.add_autocast(name, exact, before, after, times)
    return rows.result(inputs.block)


def peak_memory(inputs: Inputs, batch: int, swapped: bool) -> int:
    """By how many bytes one training step in bf16 autocast raises the memory of this process."""
    return peak_of(inputs.block, lambda: _step(inputs, torch.bfloat16), swapped)


if __name__ == "__main__":
    replace_unprintable()
    answer(make, compare, peak_memory)
