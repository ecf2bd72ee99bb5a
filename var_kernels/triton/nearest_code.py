"""The nearest codebook entry, as a matrix product whose result never leaves the registers.

score(row, code) = z·c - |c|²/2 is -|z - c|²/2 without the term |z|²/2, which all codes share. The largest score wins.
Rows and codes are counted from the centre of the codebook, a point near the codes, so that scores and their rounding
errors are as small as distances. With cosine the score is z·c with the normalised code c / max(|c|, 1e-12), and the
centre is 0. A program holds a tile of rows, goes through tiles of the codebook and keeps the best score so far and its
index for each row, so no N×V matrix exists. Products are in fp32 (no TF32), so the bound is 2·N·V·C flops on the fp32
units.

Every code has the same operations in the same order, wherever it is in the codebook, so equal codes have equal scores.
Inside a tile the lowest index with the highest score is taken, and a later tile must have a higher score to win, so
ties go to the lowest index. A NaN loses every comparison and the search starts at -inf, so neither NaN nor -inf is
chosen.

Few rows do not fill a GPU. Then the codebook is split among programs, each of which stores one candidate per row, and a
second kernel compares the candidates.
"""

import functools

import torch
import triton
import triton.language as tl

from .configs import choose
from .launch import launch
from .targets import target_of

# ---- helpers ---------------------------------------------------------------------------------------------------------

_NO_INDEX = tl.constexpr(2147483647)


@triton.jit
def load_codes(codes, v0, end, c, channels, BLOCK_V: tl.constexpr):
    """Codes v0 … v0 + BLOCK_V as columns, (channels, codes), in fp32; zero outside the codebook."""
    v = tl.arange(0, BLOCK_V)
    pointers = codes + tl.cast(v0, tl.int64) * channels + v[None, :] * channels + c[:, None]
    return tl.load(pointers, mask=(v[None, :] < end - v0) & (c[:, None] < channels), other=0.0).to(tl.float32)


@triton.jit
def centre_of(codes, num_codes, c, channels, SOME: tl.constexpr):
    """The centre of the codebook in channels c, from SOME codes that are spread evenly over it: the middle between
    their least and greatest finite elements if it is farther from 0 than these are apart, else 0."""
    v = tl.arange(0, SOME).to(tl.int64) * num_codes // SOME
    pointers = codes + v[None, :] * channels + c[:, None]
    some = tl.load(pointers, mask=c[:, None] < channels, other=0.0)
    finite = tl.abs(some) < float("inf")
    low = tl.min(tl.where(finite, some, float("inf")), axis=1)
    high = tl.max(tl.where(finite, some, float("-inf")), axis=1)
    middle = 0.5 * low + 0.5 * high
    return tl.where(tl.abs(middle) > high - low, middle, 0.0)


@triton.jit
def keep_better(products, v0, end, code_terms, best, index, BLOCK_V: tl.constexpr):
    """Updates the best score and index of each row by the products z·c with codes v0 … v0 + BLOCK_V."""
    v = v0 + tl.arange(0, BLOCK_V)
    scores = products + tl.load(code_terms + v, mask=v < end, other=float("-inf"))[None, :]
    top = tl.max(scores, axis=1)
    lowest = tl.min(tl.where(scores == top[:, None], v[None, :], _NO_INDEX), axis=1)
    better = top > best
    return tl.where(better, top, best), tl.where(better, lowest, index)


@triton.jit
def scan_codes(
    z, codes, code_terms, begin, end, channels,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Best score and index of each row of z (BLOCK_N, BLOCK_C) among the codes begin … end; all channels are in z."""
    c = tl.arange(0, BLOCK_C)
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_N,), tl.int32)
    for v0 in tl.range(begin, end, BLOCK_V):
        tile = load_codes(codes, v0, end, c, channels, BLOCK_V)
        products = tl.dot(z, tile, input_precision="ieee")
        best, index = keep_better(products, v0, end, code_terms, best, index, BLOCK_V)
    return best, index


@triton.jit
def store_choice(
    best, index, rows, num_rows, split, scores, candidates, tokens, image_tokens, image_stride, token_offset,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Stores one candidate per row of this split or, without splits, the tokens."""
    inside = rows < num_rows
    if SPLIT:
        at = split.to(tl.int64) * num_rows + rows
        tl.store(scores + at, best, mask=inside)
        tl.store(candidates + at, index, mask=inside)
    else:
        at = (rows // image_tokens).to(tl.int64) * image_stride + token_offset + rows % image_tokens
        tl.store(tokens + at, index.to(tl.int64), mask=inside)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def prepare(
    codes, searched, code_terms, centre, num_codes, channels,
    COSINE: tl.constexpr, SOME: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Writes the centre of the codebook, the codes counted from it, and -|c|²/2, the term of each code in its scores.
    With COSINE, centre and terms are zero, and the codes are the normalised ones, c / max(|c|, 1e-12).

    Codes are divided, not scores, so that codes of one direction that normalise to the same numbers tie.
    """
    v0 = tl.program_id(0) * BLOCK_V
    v = v0 + tl.arange(0, BLOCK_V)
    # Squares are added across lanes only after the loop. A product right before that addition would be fused into it:
    # each lane would add its own square unrounded, so lanes would have different sums.
    squares_of_tile = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for c0 in tl.range(0, channels, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        tile = load_codes(codes, v0, num_codes, c, channels, BLOCK_V)
        mask = (v[None, :] < num_codes) & (c[:, None] < channels)
        if COSINE:
            point = tl.zeros((BLOCK_C,), tl.float32)
        else:
            point = centre_of(codes, num_codes, c, channels, SOME)
            tile = tl.where(mask, tile - point[:, None], 0.0)
            tl.store(searched + v.to(tl.int64)[None, :] * channels + c[:, None], tile, mask=mask)
        if v0 == 0:
            tl.store(centre + c, point, mask=c < channels)
        squares_of_tile += tile * tile
    squares = tl.sum(squares_of_tile, axis=0)
    if COSINE:
        length = tl.maximum(tl.sqrt_rn(squares), 1e-12)
        for c0 in tl.range(0, channels, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            tile = load_codes(codes, v0, num_codes, c, channels, BLOCK_V)
            pointers = searched + v.to(tl.int64)[None, :] * channels + c[:, None]
            mask = (v[None, :] < num_codes) & (c[:, None] < channels)
            tl.store(pointers, tl.div_rn(tile, length[None, :]), mask=mask)
        squares = tl.zeros((BLOCK_V,), tl.float32)
    tl.store(code_terms + v, squares * -0.5, mask=v < num_codes)


@triton.jit(do_not_specialize=["num_rows", "image_tokens", "image_stride", "token_offset"])
def search(
    z, centre, codes, code_terms, scores, candidates, tokens, num_rows, num_codes, channels, split_codes,
    row_stride, z_channel_stride, image_tokens, image_stride, token_offset,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compares a tile of rows, with at most BLOCK_C channels, with one split of the codebook, from split · split_codes
    on."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * split_codes
    end = tl.minimum(begin + split_codes, num_codes)
    c = tl.arange(0, BLOCK_C)
    pointers = z + rows.to(tl.int64)[:, None] * row_stride + c[None, :] * z_channel_stride
    mask = (rows[:, None] < num_rows) & (c[None, :] < channels)
    tile = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tile -= tl.load(centre + c, mask=c < channels, other=0.0)[None, :]
    best, index = scan_codes(
        tile, codes, code_terms, begin, end, channels, BLOCK_N, BLOCK_V, BLOCK_C
    )
    store_choice(
        best, index, rows, num_rows, split, scores, candidates, tokens, image_tokens, image_stride, token_offset, SPLIT
    )


@triton.jit(do_not_specialize=["num_rows", "image_tokens", "image_stride", "token_offset"])
def search_wide(
    z, centre, codes, code_terms, scores, candidates, tokens, num_rows, num_codes, channels, split_codes,
    row_stride, z_channel_stride, image_tokens, image_stride, token_offset,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`search` for any number of channels: it reads the rows again, from cache, for each tile of the codebook."""
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = split * split_codes
    end = tl.minimum(begin + split_codes, num_codes)
    row_starts = z + rows.to(tl.int64)[:, None] * row_stride
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    index = tl.zeros((BLOCK_N,), tl.int32)
    for v0 in tl.range(begin, end, BLOCK_V):
        products = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for c0 in tl.range(0, channels, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mask = (rows[:, None] < num_rows) & (c[None, :] < channels)
            chunk = tl.load(row_starts + c[None, :] * z_channel_stride, mask=mask, other=0.0).to(tl.float32)
            chunk -= tl.load(centre + c, mask=c < channels, other=0.0)[None, :]
            tile = load_codes(codes, v0, end, c, channels, BLOCK_V)
            products = tl.dot(chunk, tile, products, input_precision="ieee")
        best, index = keep_better(products, v0, end, code_terms, best, index, BLOCK_V)
    store_choice(
        best, index, rows, num_rows, split, scores, candidates, tokens, image_tokens, image_stride, token_offset, SPLIT
    )


@triton.jit(do_not_specialize=["num_rows", "splits", "image_tokens", "image_stride", "token_offset"])
def reduce(
    scores, candidates, tokens, num_rows, splits, image_tokens, image_stride, token_offset,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The best candidate of each row, the lowest index among equals; 0 where no split found any."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.arange(0, BLOCK_S)
    inside = (rows[:, None] < num_rows) & (split[None, :] < splits)
    at = split[None, :].to(tl.int64) * num_rows + rows[:, None]
    score = tl.load(scores + at, mask=inside, other=float("-inf"))
    index = tl.load(candidates + at, mask=inside, other=0)
    top = tl.max(score, axis=1)
    lowest = tl.min(tl.where(score == top[:, None], index, _NO_INDEX), axis=1)
    lowest = tl.where(top > float("-inf"), lowest, 0)
    at = (rows // image_tokens).to(tl.int64) * image_stride + token_offset + rows % image_tokens
    tl.store(tokens + at, lowest.to(tl.int64), mask=rows < num_rows)


# The centre is computed from so many codes, as in the reference.
CENTRE_CODES = 32

# ---- launchers -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def count_splits(row_tiles: int, code_tiles: int, multiprocessors: int, limit: int) -> tuple[int, int]:
    """The number of splits that the search is divided into, and the number of codebook tiles in each.

    With this number of splits the busiest multiprocessor has the least work; of equal numbers, the smallest is taken.
    The second kernel and a program's own start cost about as much as two tiles.
    """
    overhead = 2

    def work(splits: int) -> int:
        per_split = triton.cdiv(code_tiles, splits)
        return triton.cdiv(row_tiles * splits, multiprocessors) * (per_split + overhead) + overhead * (splits > 1)

    best = min(range(1, min(limit, code_tiles) + 1), key=work)
    per_split = triton.cdiv(code_tiles, best)
    return triton.cdiv(code_tiles, per_split), per_split


class Codebook:
    """A codebook (V, C) with any strides, in fp32, with what every search in it needs."""

    def __init__(self, codes: torch.Tensor, cosine: bool):
        # Converted to fp32 once: a 16-bit tile would go through shared memory twice for every tile of rows.
        self.codes = codes.float().contiguous()
        self.size, self.channels = codes.shape
        self.terms = self.codes.new_empty(self.size)
        self.centre = self.codes.new_empty(self.channels)
        self.searched = torch.empty_like(self.codes)
        config = choose("nearest_code.prepare", target_of(codes.device), self.channels, 4)
        arguments = {"codes": self.codes, "searched": self.searched, "code_terms": self.terms, "centre": self.centre}
        arguments |= {"num_codes": self.size, "channels": self.channels, "COSINE": cosine, "SOME": CENTRE_CODES}
        launch(prepare, (triton.cdiv(self.size, config.tiles["BLOCK_V"]),), arguments, config)

    def search(
        self, kernel, name: str, num_rows: int, rows: dict, tokens: torch.Tensor, image: tuple[int, int, int]
    ) -> None:
        """Launches `kernel`, named "<stem>.<function>", over all rows and codes, and `reduce` if there are several
        splits.

        `rows` are the kernel's own arguments. With (length, stride, offset) = `image`, row i is token i % length of
        image i // length. The tokens of an image are consecutive from `offset` on; images are `stride` apart.
        """
        target = target_of(self.codes.device)
        config = choose(name, target, num_rows, 4)
        reduction = choose("nearest_code.reduce", target, num_rows, 4)
        block_v = config.tiles["BLOCK_V"]
        row_tiles = triton.cdiv(num_rows, config.tiles["BLOCK_N"])
        splits, tiles = count_splits(
            row_tiles, triton.cdiv(self.size, block_v), target.multiprocessors, reduction.tiles["BLOCK_S"]
        )
        scores = self.terms.new_empty(splits * num_rows if splits > 1 else 1)
        candidates = scores.new_empty(scores.shape, dtype=torch.int32)
        places = {"scores": scores, "candidates": candidates, "tokens": tokens, "num_rows": num_rows}
        places |= dict(zip(("image_tokens", "image_stride", "token_offset"), image, strict=True))
        codes = {"codes": self.searched, "centre": self.centre, "code_terms": self.terms, "num_codes": self.size}
        codes |= {"channels": self.channels, "split_codes": tiles * block_v, "SPLIT": splits > 1}
        launch(kernel, (row_tiles, splits), codes | rows | places, config)
        if splits > 1:
            grid = (triton.cdiv(num_rows, reduction.tiles["BLOCK_N"]),)
            launch(reduce, grid, places | {"splits": splits}, reduction)

    def find(self, z: torch.Tensor, tokens: torch.Tensor, image: tuple[int, int, int]) -> None:
        """Runs the search for the rows of z (N, C), with any strides."""
        rows = {"z": z, "row_stride": z.stride(0), "z_channel_stride": z.stride(1)}
        if z.shape[1] * z.stride(1) >= 1 << 31:  # offsets of columns are 32-bit numbers
            z = z.contiguous()
        wide = self.channels > choose("nearest_code.search", target_of(z.device), z.shape[0], 4).tiles["BLOCK_C"]
        kernel, name = (search_wide, "nearest_code.search_wide") if wide else (search, "nearest_code.search")
        self.search(kernel, name, z.shape[0], rows, tokens, image)


def nearest_code(z: torch.Tensor, codebook: torch.Tensor, cosine: bool) -> torch.Tensor:
    """The raw operator `_nearest_code`: z (N, C) and codebook (V, C) of one dtype -> int64 (N,)."""
    tokens = z.new_empty(z.shape[:1], dtype=torch.int64)
    if z.numel():
        Codebook(codebook, cosine).find(z, tokens, (z.shape[0], 0, 0))
    return tokens
