"""Infinity's `FlexAttn`, which wraps PyTorch's flex_attention: its mask is a schedule, or all keys of a cache.

Facts are read from `infinity/models/flex_attn.py` of https://github.com/FoundationVision/Infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..block_causal_attention import MAX_HEAD_DIM, block_causal_attention
from .block_causal import schedule_of_ends
from .structure import Target, known, left_to_the_original

# What every mask function that was read is, by the number of tokens.
_READ: WeakKeyDictionary[Callable, dict[int, list[int] | int | str]] = WeakKeyDictionary()
_ROWS = 512  # of the mask are read at once, so that no L x L tensor is made


def _attention(self: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None):
    """`FlexAttn.forward`, tensors (B, H, L, D)."""
    lens = _lens_of_call(self, q, k, v)
    if isinstance(lens, str):
        return left_to_the_original(self, "forward", lens, q, k, v, scale=scale)
    keys = sum(lens)
    with torch.autocast(v.device.type, enabled=False):  # flex_attention computes in the dtype of v
        return block_causal_attention(q.to(v.dtype), k[:, :, :keys].to(v.dtype), v[:, :, :keys], lens,
                                      softmax_scale=scale)  # fmt: skip


def _lens_of_call(self: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[int] | str:
    """The lengths of the scales of the visible keys, or why this call is left to the original."""
    if q.dim() != 4 or q.shape[1] != k.shape[1] or k.shape != v.shape or q.shape[3] > MAX_HEAD_DIM:
        return f"q {tuple(q.shape)} beside k {tuple(k.shape)} and v {tuple(v.shape)}"
    found, queries, keys = _mask_of(self), q.shape[2], k.shape[2]
    if isinstance(found, int):
        # Keys that the original pads would be visible zeros.
        return [found] if found <= keys and queries <= found else f"{queries} queries and {keys} keys beside {found}"
    if isinstance(found, str):
        return found
    for scales, end in enumerate(accumulate(found), start=1):
        # The original takes fewer tokens than the mask has only if it pads them, by keys that nobody sees.
        if queries == keys == end and (scales == len(found) or self.auto_padding):
            return found[:scales]
    return f"{queries} queries and {keys} keys beside a schedule of {sum(found)} tokens"


def _mask_of(module: nn.Module) -> list[int] | int | str:
    """The lengths of the scales of the mask; the number of keys if every query sees the same; or why it is neither."""
    function, length = module.mask_mod, int(module.offsets[-1])
    read = _READ.setdefault(function, {})
    if length not in read:
        read[length] = _read(function, length, module.offsets.device)
    return read[length]


def _read(function: Callable, length: int, device: torch.device) -> list[int] | int | str:
    zero, keys = torch.zeros((), dtype=torch.int32, device=device), torch.arange(length, device=device)
    ends = []
    for rows in keys.split(_ROWS):
        visible = torch.as_tensor(function(zero, zero, rows[:, None], keys[None]), device=device)
        visible = visible.expand(len(rows), length)
        ends.append(visible.sum(-1))
        if not bool((visible == (keys < ends[-1][:, None])).all()):
            return "its mask is not block-causal"
    ends = torch.cat(ends)
    if bool((ends == ends[0]).all()):
        return int(ends[0]) or "its mask shows no key"
    lens = schedule_of_ends(ends)
    return "its mask is not block-causal" if isinstance(lens, str) else lens


def _refusal(module: nn.Module) -> str | None:
    name = getattr(module.mask_mod, "__name__", type(module.mask_mod).__name__)
    if name not in ("var_mask_mod", "_causal_mask"):
        return f"its mask is {name}, expected var_mask_mod or _causal_mask"
    found = _mask_of(module)
    return found if isinstance(found, str) else None


FLEX = Target(
    name="FlexAttn of Infinity",
    part="attention",
    attributes=("block_scales", "lengths", "offsets", "mask_mod", "block_mask", "auto_padding", "flex_attention"),
    methods={
        "forward": known("q k v scale", "F auto_padding block_mask dtype flex_attention pad shape to"),
    },
    refusal=_refusal,
    replacements={"forward": _attention},
)
TARGETS = (FLEX,)
