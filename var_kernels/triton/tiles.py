"""The tiles of a block-causal score matrix, as tables for GPU kernels, computed on the host from the lengths.

The visible part of the matrix is a staircase. A kernel cuts the rows (or the keys) into tiles of limited size, and for
each tile walks over whole blocks of the other side. The places of the cuts decide how much of the invisible part is
visited. A tile that ends where a scale ends visits nothing that its last row does not see. Small scales share a tile,
because a tile of few rows costs as much as a full one. `query_tiles` and `key_tiles` find the cheapest cuts.

`csrc/cuda/block_causal_attention_tiles.h` has the same two functions for the CUDA backend, and a test compares them.
The CPU kernels need tiles whose rows all see the same keys, so their entry function
(`csrc/cpu/block_causal_attention.cpp`) cuts by a rule of its own.

`device_table` keeps the tables on the GPU, so a schedule is a run-time argument: a new schedule needs a small tensor,
but no new kernel.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import torch


class QueryTile(NamedTuple):
    """`count` query rows from `first` on. All of them see the keys below `common`; some see keys up to `limit`."""

    first: int
    count: int
    common: int
    limit: int


class KeyTile(NamedTuple):
    """`count` keys from `first` on. Rows from `common` on see all of them; rows below `limit` see none."""

    first: int
    count: int
    common: int
    limit: int


def visible_ends(lens: Sequence[int]) -> list[int]:
    """The end of each token's scale, which is the number of keys that the token sees."""
    return [end for length, end in zip(lens, accumulate(lens), strict=True) for _ in range(length)]


def query_tiles(lens: Sequence[int], q_offset: int, queries: int, rows: int, keys: int) -> list[QueryTile]:
    """Cuts the query rows, tokens `q_offset` to `q_offset + queries`, into tiles of at most `rows`, for a kernel that
    visits the keys from 0 in blocks of `keys`. The tiles with the most work come first; the short ones fill the gaps at
    the end.
    """
    ends = [end for end in accumulate(lens) if end > q_offset]
    bounds = [min(end - q_offset, queries) for end in ends]
    cuts = _cheapest_cuts(bounds[: bounds.index(queries) + 1], [_blocks(end, keys) for end in ends], rows)
    tiles = []
    for begin, end in cuts:
        common, limit = (ends[bisect_right(bounds, row)] for row in (begin, end - 1))
        tiles.append(QueryTile(begin, end - begin, common, limit))
    return sorted(tiles, key=lambda tile: -tile.limit)


def key_tiles(lens: Sequence[int], q_offset: int, queries: int, keys: int, rows: int) -> list[KeyTile]:
    """Cuts all keys into tiles of at most `keys`, for a kernel that visits, in blocks of `rows`, the rows that see
    some key of the tile. A tile that no row sees has `limit` = `common` = `queries`. The tiles with the most work come
    first.
    """
    total = sum(lens)
    starts = [end - length for length, end in zip(lens, accumulate(lens), strict=True)]
    first_rows = [min(max(start - q_offset, 0), queries) for start in starts]
    # The rows that see a tile follow from its first key. Counted backwards from the last key, this is the problem
    # above.
    costs = [_blocks(queries - row, rows) for row in reversed(first_rows)]
    tiles = []
    for begin, end in _cheapest_cuts([total - start for start in reversed(starts)], costs, keys):
        first, last = total - end, total - begin - 1
        limit, common = (first_rows[bisect_right(starts, key) - 1] for key in (first, last))
        tiles.append(KeyTile(first, last + 1 - first, common, limit))
    return sorted(tiles, key=lambda tile: tile.limit)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _cheapest_cuts(bounds: Sequence[int], costs: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Cuts range(bounds[-1]) into pieces of at most `size` such that the sum of the pieces' costs is least.

    A piece costs costs[i], where i is the interval (bounds[i-1], bounds[i]] of its last element, plus 1 for its start;
    costs do not decrease. If there is room, the elements of equal cost that follow may join the piece for nothing. So a
    piece either ends at a bound or is full, and few ends have to be tried.
    """
    steps = [i for i in range(len(bounds)) if i + 1 == len(bounds) or costs[i] != costs[i + 1]]
    ends, costs = [bounds[i] for i in steps], [costs[i] for i in steps]
    best: dict[int, tuple[int, int]] = {0: (0, 0)}  # cut -> (the cost of everything before it, the cut before it)
    for begin in range(ends[-1]):
        if begin not in best:
            continue
        total = best[begin][0]
        for i in range(bisect_right(ends, begin), len(ends)):
            end = min(ends[i], begin + size)
            price = total + costs[i] + 1
            if end not in best or price < best[end][0]:
                best[end] = (price, begin)
            if end < ends[i] or end == begin + size:
                break
    pieces, end = [], ends[-1]
    while end > 0:
        pieces.append((best[end][1], end))
        end = best[end][1]
    return pieces[::-1]


# ---- on the device


class DeviceTable(NamedTuple):
    """`tiles` (count, 4) int32 has the tuples above as rows; `ends` (Lk,) int32 is the number of keys that each token
    sees."""

    tiles: torch.Tensor
    ends: torch.Tensor


_CAPACITY = 512
_tables: OrderedDict[tuple, DeviceTable] = OrderedDict()
_captured: dict[tuple, DeviceTable] = {}  # never dropped: CUDA graphs hold their addresses
_lock = threading.Lock()  # the backward runs in threads of autograd


def device_table(
    tiling: Callable[..., list], lens: Sequence[int], q_offset: int, queries: int, own: int, other: int,
    device: torch.device,
) -> DeviceTable:
    """The result of `tiling` (`query_tiles` or `key_tiles`) as tensors on `device`, from a cache if an earlier call
    made it. A repeated call copies nothing, so a CUDA graph can capture it after it has run once.
    """
    key = (tiling, tuple(lens), q_offset, queries, own, other, device)
    with _lock:
        table = _tables.get(key) or _captured.get(key)
        if table is None:
            table = _upload(tiling(lens, q_offset, queries, own, other), visible_ends(lens), device)
            _make_room(device)
            _tables[key] = table
        elif key in _tables:
            _tables.move_to_end(key)
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _captured[key] = table
    return table


def _upload(tiles: list, ends: list[int], device: torch.device) -> DeviceTable:
    flat = [number for tile in tiles for number in tile]
    # The tiles' 16-byte rows come first, so that both parts are aligned. The copy is blocking, so that the table is
    # complete for any stream that uses it next. It runs in a thread of its own: while torch.compile warms up a CUDA
    # graph, memory that the current thread allocates belongs to that graph, which reuses it at its next replay.
    both = torch.tensor(flat + ends, dtype=torch.int32, device="cpu")
    with ThreadPoolExecutor(max_workers=1) as thread:
        both = thread.submit(both.to, device).result()
    return DeviceTable(both[: len(flat)].view(-1, 4), both[len(flat) :])


def _make_room(device: torch.device) -> None:
    if len(_tables) < _CAPACITY or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    oldest = [*_tables][: _CAPACITY // 2]
    for used in {key[-1] for key in oldest if key[-1].type == "cuda"}:
        torch.cuda.synchronize(used)  # kernels on any stream may still read them; once per 256 new schedules
    for key in oldest:
        del _tables[key]
