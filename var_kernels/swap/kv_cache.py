"""Key-value caches of attention classes whose attributes `cached_k` and `cached_v` hold all earlier keys and values.

The originals join the cache with the new tokens at every scale, which copies it. Here the two attributes are the first
rows of memory that has room for more; layout, dtype and content are those of the originals.
"""

from __future__ import annotations

import torch
from torch import nn


def append(module: nn.Module, k: torch.Tensor, v: torch.Tensor, tokens_first: bool) -> tuple[torch.Tensor, ...]:
    """Appends keys and values (B, H, L, D) to the caches of the module. Returns all of them, (B, H, ·, D).

    With `tokens_first` the attributes of the module are (B, L, H, D), else (B, H, L, D).
    """
    joined = []
    for name, new in (("cached_k", k), ("cached_v", v)):
        old = getattr(module, name)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (old, new)):
            whole = new if old is None else torch.cat((_by_heads(old, tokens_first), new), dim=2)
            setattr(module, name, _by_heads(whole, tokens_first))
        else:
            rows, start = rows_with_room(old, new, tokens_first)
            end = start + new.shape[2]
            rows[:, :, start:end] = new
            whole = keep(module, name, rows, end, tokens_first)
        joined.append(whole)
    return tuple(joined)


def rows_with_room(old: torch.Tensor | None, new: torch.Tensor, tokens_first: bool) -> tuple[torch.Tensor, int]:
    """Memory (B, H, rows, D) that begins with the cache `old` and has room for `new`, and where the room begins."""
    batch, heads, count, dim = new.shape
    if old is None:
        return _memory(new, max(count, 64), new.dtype, tokens_first), 0
    earlier = _by_heads(old, tokens_first)
    if earlier.device != new.device or earlier.shape != (batch, heads, earlier.shape[2], dim):
        torch.cat((earlier, new), dim=2)  # it raises what the original raises
    start, dtype = earlier.shape[2], torch.promote_types(old.dtype, new.dtype)
    rows = getattr(old, "rows_with_room", None)
    if rows is not None and _can_grow(rows, old, start, start + count, dtype):
        return rows, start
    rows = _memory(new, max(start + count, 2 * start, 64), dtype, tokens_first)
    rows[:, :, :start] = earlier
    return rows, start


def keep(module: nn.Module, name: str, rows: torch.Tensor, end: int, tokens_first: bool) -> torch.Tensor:
    """Makes the first `end` rows the attribute `name` of the module. Returns them, (B, H, end, D)."""
    whole = rows[:, :, :end]
    cached = _by_heads(whole, tokens_first)
    rows.filled = end
    cached.rows_with_room = rows
    setattr(module, name, cached)
    return whole


def _can_grow(rows: torch.Tensor, old: torch.Tensor, start: int, end: int, dtype: torch.dtype) -> bool:
    """Whether rows after `start` may be written: nobody else has them, and `old` is still the beginning of `rows`."""
    return (
        rows.shape[2] >= end
        and rows.dtype == dtype
        and rows.filled == start  # else a later cache, which somebody may go back to, holds the next rows
        and rows.data_ptr() == old.data_ptr()
        and rows.is_inference() == torch.is_inference_mode_enabled()
    )


def _memory(new: torch.Tensor, rows: int, dtype: torch.dtype, tokens_first: bool) -> torch.Tensor:
    batch, heads, _, dim = new.shape
    shape = (batch, rows, heads, dim) if tokens_first else (batch, heads, rows, dim)
    return _by_heads(new.new_empty(shape, dtype=dtype), tokens_first)


def _by_heads(x: torch.Tensor, tokens_first: bool) -> torch.Tensor:
    return x.transpose(1, 2) if tokens_first else x
