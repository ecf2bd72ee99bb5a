"""Recognising a mask as block-causal, so that it need not be read again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch.utils.weak import WeakTensorKeyDictionary

# Of every tensor that was read: the function that read it, the number of tokens, its version, and the result.
_READ: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

Schedule = list[int] | str  # the lengths of the scales, or why there are none


def _read_once(tensor: torch.Tensor, length: int, read: Callable):
    """`read(tensor, length)`, remembered until the tensor is written to or dies."""
    if tensor.is_inference():  # it has no version
        return read(tensor, length)
    key = (read, length, tensor._version)
    known = _READ.get(tensor)
    if known is None or known[0] != key:
        known = _READ[tensor] = (key, read(tensor, length))
    return known[1]


class BlockCausalBias:
    """Stands for the float mask `mask` (1, 1, L, L) of a schedule of scales, so that no converted copy of it is made.

    It can be cut to the first scales, `bias[:, :, :end, :end]`, and converted by `to`. Everything else is done with the
    mask itself.
    """

    def __init__(self, lens: Sequence[int], mask: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self.lens, self._mask, self._dtype = list(lens), mask, dtype

    def __getitem__(self, index) -> BlockCausalBias | torch.Tensor:
        ends = list(accumulate(self.lens))
        for scales, end in enumerate(ends, start=1):
            if index == (slice(None), slice(None), slice(None, end), slice(None, end)):
                return BlockCausalBias(self.lens[:scales], self._mask, self._dtype)
        return self.tensor()[index]

    def to(self, *, dtype: torch.dtype) -> BlockCausalBias:
        return BlockCausalBias(self.lens, self._mask, dtype)

    def tensor(self) -> torch.Tensor:
        length = sum(self.lens)
        return self._mask[:, :, :length, :length].to(dtype=self._dtype)

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


def schedule_of(mask: torch.Tensor, length: int) -> Schedule:
    """The lengths of the scales of which `mask` is the block-causal mask, or why it is none.

    mask: (..., L, L), 0 or True where a query sees a key, -inf (or less than any float of another value) or False where
    it does not; the leading dimensions must have size 1 or be expanded. If L is more than `length`, the rest is
    padding, which no earlier query may see. A mask is read once, and again if it was written to since.
    """
    found = padded_schedule_of(mask, length)
    if isinstance(found, str):
        return found
    lens, padding = found
    return "a mask that is not block-causal" if padding else lens


def padded_schedule_of(mask: torch.Tensor, length: int) -> tuple[list[int], int] | str:
    """As `schedule_of`, for masks whose last rows may be padding: the lengths of the scales, and how many such rows.

    A row of padding sees key 0 and nothing else, and no other row sees its key.
    """
    return _read_once(mask, length, _read_mask)


def schedule_of_ends(ends: torch.Tensor) -> Schedule:
    """The lengths of the scales in which token i sees the first ends[i] keys, for integers ends (L,)."""
    return _read_once(ends, len(ends), _read_ends)


def schedule_of_starts(starts: torch.Tensor) -> Schedule:
    """The lengths of the scales in which the first starts[j] tokens don't see key j, for integers starts (L,)."""
    return _read_once(starts, len(starts), _read_starts)


def _read_ends(ends: torch.Tensor, length: int) -> Schedule:
    return _lens(ends.tolist()) or "no ends of scales"


def _read_starts(starts: torch.Tensor, length: int) -> Schedule:
    numbers = starts.tolist()
    later = sorted({*numbers, length})
    if numbers != [start for start, end in zip(later, later[1:], strict=False) for _ in range(end - start)]:
        return "no starts of scales"
    return [end - start for start, end in zip(later, later[1:], strict=False)]


def _read_mask(mask: torch.Tensor, length: int) -> tuple[list[int], int] | str:
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < length:
        return f"a mask of shape {tuple(mask.shape)} for {length} tokens"
    while mask.dim() > 2:
        if mask.shape[0] != 1 and mask.stride(0) != 0:
            return f"a mask of shape {tuple(mask.shape)}, which differs by sample or head"
        mask = mask[0]
    mask = mask.detach()[:length]
    if mask.dtype == torch.bool:
        visible = mask
    else:
        visible = mask == 0
        if not bool((visible | (mask <= torch.finfo(mask.dtype).min)).all()):
            return "a mask with other values than 0 and -inf"
    counts = visible.sum(-1)
    keys = torch.arange(mask.shape[-1], device=mask.device)
    ends = counts.tolist()
    tokens = length
    while tokens > 1 and ends[tokens - 1] == 1:  # only the first row of a schedule may see one key
        tokens -= 1
    lens = _lens(ends[:tokens])
    if not lens or not bool((visible == (keys < counts[:, None])).all()):
        return "a mask that is not block-causal"
    return lens, length - tokens


def _lens(ends: list[int]) -> list[int]:
    """The lengths of the scales in which token i sees the keys before ends[i]; none if there are no such scales."""
    lens, start = [], 0
    while start < len(ends):
        end = ends[start]
        if end <= start or ends[start:end] != [end] * (end - start):
            return []
        lens.append(end - start)
        start = end
    return lens
