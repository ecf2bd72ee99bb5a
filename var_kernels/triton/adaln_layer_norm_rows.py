"""Rows of adaln_layer_norm in registers: a row of C channels is a tuple of tiles.

There are C // CHUNK tiles of CHUNK channels, then one of TAIL channels. TAIL is the smallest power of two that holds
the remaining C % CHUNK channels (0 if there are none). One tile of the next power of two would be simpler, but 44 %
of its work would be padding at C = 1152 and 2304; here only the tail can be padded. A tile has ROWS rows. If ROWS·CHUNK
elements are one 16-byte vector for each thread of the program, every row has the same number of threads, next to each
other.
"""

import triton
import triton.language as tl


@triton.jit
def columns(i: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """The channels of tile i, (1, CHUNK or TAIL)."""
    WIDTH: tl.constexpr = CHUNK if i < C // CHUNK else TAIL
    return i * CHUNK + tl.arange(0, WIDTH)[None, :]


@triton.jit
def exists(present, i: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """Which elements of tile i exist, None if all do. `present`, (ROWS, 1) or None, says which rows exist."""
    if i < C // CHUNK or C % CHUNK == TAIL:
        mask = present
    elif present is None:
        mask = columns(i, C, CHUNK, TAIL) < C
    else:
        mask = present & (columns(i, C, CHUNK, TAIL) < C)
    return mask


@triton.jit
def load(rows, present, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """The rows that start at the pointers `rows`, (ROWS, 1), as fp32; elements that do not exist are zero."""
    tiles = ()
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        pointers = rows + columns(i, C, CHUNK, TAIL)
        mask = exists(present, i, C, CHUNK, TAIL)
        if mask is None:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=mask, other=0.0)
        tiles = tiles + (tile.to(tl.float32),)
    return tiles


@triton.jit
def load_factors(rows, present, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """1 + scale of the rows that start at the pointers `rows`."""
    scales = load(rows, present, C, CHUNK, TAIL)
    factors = ()
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        factors = factors + (1.0 + scales[i],)
    return factors


@triton.jit
def store(rows, tiles, present, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        pointers = rows + columns(i, C, CHUNK, TAIL)
        tl.store(pointers, tiles[i].to(rows.dtype.element_ty), mask=exists(present, i, C, CHUNK, TAIL))


@triton.jit
def _sum(tile):
    """The sum of each row, (ROWS, 1), or a scalar if there is only one."""
    if tile.shape[0] == 1:
        # A scalar has no layout. Sums of tiles of two widths would each have the layout of their tile, and to add them
        # the compiler would move the wider tile through shared memory to the layout of the other one.
        total = tl.sum(tl.sum(tile, axis=1), axis=0)
    else:
        total = tl.sum(tile, axis=1, keep_dims=True)
    return total


@triton.jit
def _row_sum(total, rest, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """Adds the tiles up first, so that warps exchange sums only once, and once more for a tail of another width."""
    result = _sum(total)
    if C > CHUNK and C % CHUNK != 0 and CHUNK != TAIL:
        result += _sum(rest)
    return result


@triton.jit
def mean_of_row(tiles, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """The mean of each row, in the shape that `_sum` gives. The tiles must not be products (see `mean_of_products`)."""
    PIECES: tl.constexpr = (C + CHUNK - 1) // CHUNK
    total = tiles[0]
    for i in tl.static_range(1, PIECES):
        if i < C // CHUNK or CHUNK == TAIL:
            total += tiles[i]
    return _row_sum(total, tiles[PIECES - 1], C, CHUNK, TAIL) / C


@triton.jit
def mean_of_products(a, b, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """The mean of each row of a·b."""
    # Each fma is written out, because of threads with only one element: the compiler would contract the product of such
    # a thread with the first addition between lanes. Each lane would then add its own exact product to the rounded
    # product of the other lane, and the lanes of a row would have different sums.
    PIECES: tl.constexpr = (C + CHUNK - 1) // CHUNK
    total = tl.fma(a[0], b[0], tl.zeros_like(a[0]))
    rest = total
    for i in tl.static_range(1, PIECES):
        if i < C // CHUNK or CHUNK == TAIL:
            total = tl.fma(a[i], b[i], total)
        else:
            rest = tl.fma(a[i], b[i], tl.zeros_like(a[i]))
    return _row_sum(total, rest, C, CHUNK, TAIL) / C


@triton.jit
def zeros(ROWS: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    tiles = ()
    for i in tl.static_range((C + CHUNK - 1) // CHUNK):
        tiles = tiles + (tl.zeros((ROWS, CHUNK if i < C // CHUNK else TAIL), tl.float32),)
    return tiles


@triton.jit
def rows_at(base, sample, token, stride_b, stride_l):
    """Pointers to the rows of tokens, (ROWS, 1)."""
    return base + (sample.to(tl.int64) * stride_b + token.to(tl.int64) * stride_l)
