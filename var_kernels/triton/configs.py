"""Tile sizes, warps and pipeline stages of every kernel, in one table that is read from the top.

A row serves a launch if the problem's size and element size are at most those of the row, and if the GPU has the row's
API, at least its shared memory per block and at least its architecture. The first such row is taken, so rows for GPUs
with more shared memory come before those for any GPU. No value here was measured yet. The values follow from the report
on compiled code: few or no spills, fits on the card, keeps the tensor cores busy by its static bound.

Two sources take precedence over the table: `override` in a program, then what :mod:`.tune` measured on this kind of
GPU.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..measured import tuned_tiles
from ..measured.tuned_tiles import Key
from .targets import Target


@dataclass(frozen=True)
class Config:
    """Constexpr arguments of a kernel and the options of its launch."""

    tiles: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """`config` serves problems up to `size`, with elements up to `itemsize` bytes. The meaning of size depends on the
    kernel and is stated beside its rows."""

    config: Config
    size: int = 1 << 30
    itemsize: int = 4
    api: str | None = None
    shared_memory: int = 0  # bytes per block that the GPU must have
    arch: int = 0  # the least architecture, for the cuda API

    def serves(self, target: Target, size: int, itemsize: int) -> bool:
        return (
            size <= self.size
            and itemsize <= self.itemsize
            and self.api in (None, target.api)
            and self.shared_memory <= target.shared_memory
            and (target.api != "cuda" or self.arch <= target.arch)
        )


TABLE: dict[str, tuple[Row, ...]] = {}

# nearest_code: size is the number of rows (prepare: channels). fp32 products run on the fp32 units, and a thread must
# compute many of them per value that it reads from shared memory: a tile of 8×8 per thread if there are many rows. Few
# rows get a small tile, because lanes without a row would do useless work.
TABLE |= {
    "nearest_code.prepare": (Row(Config({"BLOCK_V": 64, "BLOCK_C": 32}, num_warps=4)),),
    "nearest_code.search": (
        Row(Config({"BLOCK_N": 16, "BLOCK_V": 64, "BLOCK_C": 32}, num_warps=4, num_stages=3), size=32),
        Row(Config({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_C": 32}, num_warps=4, num_stages=3), size=2048),
        Row(Config({"BLOCK_N": 128, "BLOCK_V": 64, "BLOCK_C": 32}, num_warps=4, num_stages=2)),
    ),
    "nearest_code.search_wide": (
        Row(Config({"BLOCK_N": 16, "BLOCK_V": 64, "BLOCK_C": 32}, num_warps=4, num_stages=2), size=32),
        Row(Config({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_C": 32}, num_warps=4, num_stages=3)),
    ),
    "nearest_code.reduce": (Row(Config({"BLOCK_N": 16, "BLOCK_S": 64}, num_warps=4)),),
}

# multi_scale_quantize: size is the number of rows (search, pool) or of pixels of all maps (the others). An image's map
# is small, so a few images need small tiles to reach all multiprocessors.
TABLE |= {
    "multi_scale_quantize.search": (
        Row(Config({"BLOCK_N": 16, "BLOCK_V": 64, "BLOCK_C": 32, "BLOCK_Q": 8}, num_warps=4, num_stages=3), size=32),
        Row(Config({"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_C": 32, "BLOCK_Q": 4}, num_warps=4, num_stages=3), size=2048),
        Row(Config({"BLOCK_N": 128, "BLOCK_V": 64, "BLOCK_C": 32, "BLOCK_Q": 1}, num_warps=4, num_stages=2)),
    ),
    "multi_scale_quantize.pool": (Row(Config({"BLOCK_N": 16, "BLOCK_C": 32, "BLOCK_Q": 4}, num_warps=4)),),
    "multi_scale_quantize.upsample": (Row(Config({"BLOCK_P": 32, "BLOCK_C": 32}, num_warps=4)),),
    "multi_scale_quantize.update": (
        Row(Config({"BLOCK_P": 16, "BLOCK_I": 32, "BLOCK_O": 32}, num_warps=2, num_stages=3), size=4096),
        Row(Config({"BLOCK_P": 64, "BLOCK_I": 32, "BLOCK_O": 32}, num_warps=4, num_stages=3)),
    ),
    "multi_scale_quantize.add_scale": (
        Row(Config({"BLOCK_P": 16, "BLOCK_I": 32, "BLOCK_O": 32}, num_warps=2, num_stages=3), size=4096),
        Row(Config({"BLOCK_P": 64, "BLOCK_I": 32, "BLOCK_O": 32}, num_warps=4, num_stages=3)),
    ),
}

# The backward takes all scales of all images at once, so there are many programs. size is the number of pixels of all
# maps (phi_gradients: of one scale; downsample: tokens of the largest scale times maps; reduce_phi: partial sums).
TABLE |= {
    "multi_scale_quantize_backward.upsample": (Row(Config({"BLOCK_P": 32, "BLOCK_C": 32}, num_warps=4)),),
    "multi_scale_quantize_backward.convolve": (
        Row(Config({"BLOCK_P": 16, "BLOCK_I": 32, "BLOCK_O": 32}, num_warps=2, num_stages=3), size=4096),
        Row(Config({"BLOCK_P": 64, "BLOCK_I": 32, "BLOCK_O": 32}, num_warps=4, num_stages=3)),
    ),
    "multi_scale_quantize_backward.suffix_sums": (Row(Config({"BLOCK_P": 32, "BLOCK_C": 32}, num_warps=4)),),
    "multi_scale_quantize_backward.phi_gradients": (
        Row(Config({"BLOCK_P": 32, "BLOCK_I": 32, "BLOCK_O": 32}, num_warps=1, num_stages=3)),
    ),
    "multi_scale_quantize_backward.reduce_phi": (Row(Config({"BLOCK": 256}, num_warps=2)),),
    "multi_scale_quantize_backward.downsample": (
        Row(Config({"BLOCK_T": 32, "BLOCK_P": 32, "BLOCK_C": 32}, num_warps=4, num_stages=2)),
    ),
    "multi_scale_quantize_backward.sum_tokens": (Row(Config({"BLOCK_T": 16, "BLOCK_C": 32}, num_warps=1)),),
}

# adaln_layer_norm: size is the number of fp32 values of a row that a program keeps in registers (sum_partials:
# channels). A row has the smallest power of two of threads with at most 96 values each, and CHUNK is 16 bytes for each
# thread. A program works on one row at a time, or on one warp of rows; so a warp waits only for the warps of its own
# row. `registers` limits the compiler to the number that suffices, because the number of programs assumes that so many
# programs are resident. The last row is for widths beyond the model family, up to 16384 channels: values that do not
# fit in registers are in local memory.
_ADALN_ROWS = tuple(
    Row(
        Config(
            {"ROWS": max(1, warp_size // threads), "CHUNK": threads * 16 // itemsize},
            num_warps=max(1, threads // warp_size),
            options={"maxnreg": registers} if api == "cuda" else {},
        ),
        size=values * threads,
        itemsize=itemsize,
        api=api,
    )
    for api, warp_size in (("cuda", 32), ("hip", 64))
    for itemsize in (2, 4)
    for threads, values, registers in (
        *itertools.chain(*(((t, 56, 112), (t, 72, 128), (t, 96, 168)) for t in (8, 16, 32, 64, 128, 256))),
        (512, 288, 128),
    )
)
TABLE |= {
    "adaln_layer_norm.adaln_forward": _ADALN_ROWS,
    "adaln_layer_norm.adaln_backward": _ADALN_ROWS,
    "adaln_layer_norm.sum_partials": (Row(Config({"ROWS": 32, "CHUNK": 64}, num_warps=4)),),
}

# qk_norm_cache: size is the head dimension, rounded up to a power of two. A program has enough heads for a 16-byte
# vector in each thread, of queries, keys and values.
TABLE |= {
    "qk_norm_cache.qk_norm_cache_rows": tuple(
        Row(Config({"HEADS": max(1, 2048 // itemsize // size)}, num_warps=4), size=size, itemsize=itemsize)
        for itemsize in (2, 4)
        for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    )
}

# sample_tokens: size is the vocabulary, rounded up to a power of two of blocks of 64. A row stays in registers; with
# half as many waves AMD's compiler spills.
TABLE |= {
    "sample_tokens.sample_row": (
        Row(Config({}, num_warps=4), size=2048),
        Row(Config({}, num_warps=16), size=8192, api="hip"),
        Row(Config({}, num_warps=8), size=8192),
        Row(Config({}, num_warps=16)),
    ),
}

# block_causal_attention: size is the head dimension, rounded up to a power of two, and twice that if rows are not
# aligned to 16 bytes. On tensor cores a warp takes 16 rows of its tile, so 64 rows are 4 warps; the blocks of the other
# side are as wide as registers allow. A B200 multiplies 128 rows at once. With 128 columns, only a B200 has registers
# for dk, dv and a pipeline; with 256 columns, all warps share the columns of 16 or 32 keys. fp32 runs on the fp32
# units, whose operands come from registers, so its tiles are small. `registers` is given where the compiler would
# otherwise spill a few registers to have more programs resident.
def _attention(size: int, rows: int, keys: int, num_warps: int, num_stages: int, registers: int = 0, **limits) -> Row:
    options = {"maxnreg": registers} if registers else {}
    return Row(Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps, num_stages, options), size, **limits)


TABLE |= {
    "block_causal_attention.forward": (
        _attention(64, 128, 64, 8, 3, itemsize=2, shared_memory=227 << 10, arch=100),
        _attention(128, 128, 64, 8, 2, itemsize=2, shared_memory=227 << 10, arch=100),
        _attention(128, 64, 64, 4, 2, itemsize=2, shared_memory=227 << 10),
        _attention(256, 128, 32, 8, 2, itemsize=2, shared_memory=227 << 10),
        _attention(64, 64, 64, 4, 2, itemsize=2),
        _attention(128, 64, 32, 4, 2, itemsize=2),
        _attention(256, 32, 64, 8, 1, itemsize=2, api="cuda"),
        _attention(256, 64, 16, 4, 2, itemsize=2),
        _attention(64, 64, 32, 8, 2, api="cuda"),
        _attention(256, 32, 16, 8, 2, registers=128, api="cuda"),
        _attention(64, 32, 32, 4, 2),
        _attention(256, 32, 16, 4, 2),
    ),
    "block_causal_attention.backward_queries": (
        _attention(64, 64, 64, 4, 2, itemsize=2, shared_memory=227 << 10),
        _attention(128, 64, 32, 4, 2, registers=255, itemsize=2, api="cuda"),
        _attention(128, 64, 32, 4, 2, itemsize=2),
        _attention(256, 64, 16, 4, 2, itemsize=2, shared_memory=163 << 10),
        _attention(256, 16, 64, 4, 1, itemsize=2, api="cuda"),
        _attention(256, 64, 16, 4, 2, itemsize=2),
        _attention(64, 64, 32, 8, 2),
        _attention(128, 32, 32, 8, 2, api="cuda"),
        _attention(256, 16, 16, 8, 2, api="cuda"),
        _attention(128, 16, 32, 4, 1),
        _attention(256, 16, 16, 4, 1),
    ),
    "block_causal_attention.backward_keys": (
        _attention(64, 64, 64, 4, 2, itemsize=2, shared_memory=227 << 10),
        _attention(128, 32, 64, 4, 2, itemsize=2, shared_memory=227 << 10, arch=100),
        _attention(64, 32, 64, 4, 2, itemsize=2),
        _attention(128, 32, 64, 4, 1, itemsize=2, api="cuda"),
        _attention(128, 16, 64, 4, 2, itemsize=2),
        _attention(256, 64, 32, 8, 1, itemsize=2, shared_memory=163 << 10),
        _attention(256, 32, 16, 4, 1, itemsize=2),
        _attention(64, 32, 32, 8, 1, api="cuda"),
        _attention(64, 32, 32, 4, 1),
        _attention(128, 16, 32, 4, 1),
        _attention(256, 16, 16, 8, 1, api="cuda"),
        _attention(256, 16, 16, 4, 1),
    ),
}

# Global for the process, because the backward of an op runs in threads of autograd, which do not see context variables.
_overrides: dict[str, Config] = {}
_recorded: list[dict[Key, Config]] = []


def choose(kernel: str, target: Target, size: int, itemsize: int) -> Config:
    """The configuration of `kernel`, "<stem>.<function>", for a problem on a target."""
    if (config := _overrides.get(kernel)) is not None:
        return config
    row = next((row for row in TABLE[kernel] if row.serves(target, size, itemsize)), None)
    if row is None:
        raise ValueError(f"{kernel}: expected a size that the configurations serve on {target.name}, got {size}")
    key = Key(kernel, row.size, itemsize)
    config = tuned_on(target.device).get(key, row.config)
    for record in _recorded:
        record[key] = config
    return config


@functools.cache
def tuned_on(device: str) -> dict[Key, Config]:
    """The configurations measured on this kind of GPU, by its name; may be changed in place. Empty for "", which is no
    GPU.

    Measurements that were compared with other rows than those of this version are ignored.
    """
    found = {}
    for key, values in (tuned_tiles.read(device) if device else {}).items():
        if key.kernel in TABLE and values.pop("table") == fingerprint(key.kernel):
            found[key] = Config(**values)
    return found


def fingerprint(kernel: str) -> str:
    """A hash of this kernel's rows of the table."""
    return hashlib.sha256(repr(TABLE[kernel]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def recorded() -> Iterator[dict[Key, Config]]:
    """A dictionary that receives every choice made inside this context."""
    record: dict[Key, Config] = {}
    _recorded.append(record)
    try:
        yield record
    finally:
        _recorded.remove(record)


@contextlib.contextmanager
def override(configs: Mapping[str, Config]) -> Iterator[None]:
    """Inside this context, every thread uses these configurations, by "<stem>.<function>", instead of those of the
    table.

    Raises ValueError for a kernel that the table does not have.
    """
    unknown = sorted(set(configs) - set(TABLE))
    if unknown:
        raise ValueError(f"configs: expected kernels of the table, {', '.join(TABLE)}, got {', '.join(unknown)}")
    previous = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(previous)
