"""The tile tables of block-causal attention: they cover every visible element once, at the least cost."""

import ctypes
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import host_code
from var_kernels.testing import SCHEDULES, scale_lens
from var_kernels.triton import tiles
from var_kernels.triton.tiles import device_table, key_tiles, query_tiles, visible_ends


@st.composite
def problems(draw):
    lens = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    queries = draw(st.integers(1, sum(lens)))
    return lens, draw(st.integers(0, sum(lens) - queries)), queries, draw(st.integers(1, 24)), draw(st.integers(1, 24))


def blocks(length: int, block: int) -> int:
    return -(-length // block)


def assert_partition(tiles, length: int, size: int) -> None:
    pieces = sorted((tile.first, tile.count) for tile in tiles)
    assert all(0 < count <= size for _, count in pieces)
    assert [first for first, _ in pieces] == [0, *(first + count for first, count in pieces)][:-1]
    assert sum(count for _, count in pieces) == length


def cheapest(length: int, size: int, cost) -> int:
    """The least cost of all ways to cut range(length) into pieces of at most `size`, each of `cost(first, end)`."""

    @cache
    def best(end):
        return min((best(begin) + cost(begin, end) for begin in range(max(0, end - size), end)), default=0)

    return best(length)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_query_tiles(problem):
    lens, q_offset, queries, rows, keys = problem
    ends = visible_ends(lens)[q_offset : q_offset + queries]
    tiles = query_tiles(lens, q_offset, queries, rows, keys)
    assert_partition(tiles, queries, rows)
    for tile in tiles:
        of_tile = ends[tile.first : tile.first + tile.count]
        assert (tile.common, tile.limit) == (min(of_tile), max(of_tile))
    assert [tile.limit for tile in tiles] == sorted((tile.limit for tile in tiles), reverse=True)
    cost = sum(blocks(tile.limit, keys) + 1 for tile in tiles)
    assert cost == cheapest(queries, rows, lambda begin, end: blocks(ends[end - 1], keys) + 1)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_key_tiles(problem):
    lens, q_offset, queries, rows, keys = problem
    ends = visible_ends(lens)
    seen_from = [
        next((row for row in range(queries) if ends[q_offset + row] > key), queries) for key in range(sum(lens))
    ]
    tiles = key_tiles(lens, q_offset, queries, keys, rows)
    assert_partition(tiles, sum(lens), keys)
    for tile in tiles:
        of_tile = seen_from[tile.first : tile.first + tile.count]
        assert (tile.limit, tile.common) == (min(of_tile), max(of_tile))
    assert [tile.limit for tile in tiles] == sorted(tile.limit for tile in tiles)
    cost = sum(blocks(queries - tile.limit, rows) + 1 for tile in tiles)
    assert cost == cheapest(sum(lens), keys, lambda begin, end: blocks(queries - seen_from[begin], rows) + 1)


@pytest.fixture(scope="module")
def cuda_tiles(tmp_path_factory):
    """The C++ functions of the CUDA backend as Python functions like `query_tiles` and `key_tiles`."""
    library = host_code.library(
        """
#include "cuda/block_causal_attention_tiles.h"
extern "C" int64_t tiles(bool of_keys, const int64_t* lens, int64_t count, int64_t q_offset, int64_t queries,
                         int64_t own, int64_t other, int32_t* out) {
  namespace cuda = var_kernels::attention_tiles;
  const auto tiles = (of_keys ? cuda::of_keys : cuda::of_queries)({lens, lens + count}, q_offset, queries, own, other);
  for (const auto& tile : tiles)
    for (const int32_t number : {tile.first, tile.count, tile.common, tile.limit}) *out++ = number;
  return int64_t(tiles.size());
}
""",
        tmp_path_factory.mktemp("tiles"),
    )
    library.tiles.restype = ctypes.c_int64
    library.tiles.argtypes = [ctypes.c_bool, ctypes.c_void_p, *[ctypes.c_int64] * 5, ctypes.c_void_p]

    def tiling(of_keys):
        def tiles(lens, q_offset, queries, own, other):
            out = torch.empty(sum(lens), 4, dtype=torch.int32)
            lens = torch.tensor(lens)
            count = library.tiles(of_keys, lens.data_ptr(), len(lens), q_offset, queries, own, other, out.data_ptr())
            return [tuple(tile) for tile in out[:count].tolist()]

        return tiles

    return tiling(False), tiling(True)


@settings(max_examples=200, deadline=None)
@given(problems())
def test_tiles_of_cuda_are_those_of_triton(cuda_tiles, problem):
    for ours, theirs in zip((query_tiles, key_tiles), cuda_tiles, strict=True):
        assert ours(*problem) == theirs(*problem)


@pytest.mark.parametrize("name", SCHEDULES)
def test_tiles_of_cuda_are_those_of_triton_for_named_schedules(cuda_tiles, name):
    lens = scale_lens(name)
    for q_offset in (0, sum(lens) - lens[-1]):
        for own, other in ((64, 64), (32, 32), (64, 32), (64, 16)):
            problem = lens, q_offset, sum(lens) - q_offset, own, other
            for ours, theirs in zip((query_tiles, key_tiles), cuda_tiles, strict=True):
                assert ours(*problem) == theirs(*problem)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_more_blocks_than_without_alignment(name):
    """At 256px the visible elements are as many as in 69.9 blocks of 64x64."""
    lens = scale_lens(name)
    length = sum(lens)
    visited = sum(blocks(tile.limit, 64) for tile in query_tiles(lens, 0, length, 64, 64))
    unaligned = sum(blocks(visible_ends(lens)[min(row + 63, length - 1)], 64) for row in range(0, length, 64))
    assert visited <= unaligned
    if name == "256px":
        assert (visited, unaligned) == (77, 85)


def test_device_table_holds_the_tiles_and_is_kept(monkeypatch):
    monkeypatch.setattr(tiles, "_tables", type(tiles._tables)())
    cpu = torch.device("cpu")
    table = device_table(query_tiles, (1, 4, 9), 2, 12, 8, 4, cpu)
    assert table.tiles.dtype == table.ends.dtype == torch.int32
    assert table.tiles.tolist() == [list(tile) for tile in query_tiles((1, 4, 9), 2, 12, 8, 4)]
    assert table.ends.tolist() == visible_ends((1, 4, 9))
    assert table.tiles.data_ptr() % 16 == table.ends.data_ptr() % 16 == 0
    assert device_table(query_tiles, [1, 4, 9], 2, 12, 8, 4, cpu) is table
    assert device_table(key_tiles, (1, 4, 9), 2, 12, 8, 4, cpu) is not table


def test_device_tables_are_bounded_and_the_last_used_stay(monkeypatch):
    monkeypatch.setattr(tiles, "_tables", type(tiles._tables)())
    monkeypatch.setattr(tiles, "_CAPACITY", 8)
    cpu = torch.device("cpu")
    first = device_table(query_tiles, (1,), 0, 1, 8, 8, cpu)
    for length in range(2, 40):
        device_table(query_tiles, (length,), 0, length, 8, 8, cpu)
        assert device_table(query_tiles, (1,), 0, 1, 8, 8, cpu) is first
        assert len(tiles._tables) <= 8
