"""Block-causal attention in Triton: FlashAttention over the tiles of a staircase.

Let c = softmax_scale * log2(e). All sums are in float32. For each tile of query rows, a program walks over the blocks
of keys that the tile sees. For each row it keeps the maximum m of the scaled scores so far, the sum l of the
exponentials, and the sum of the weighted values. When the maximum grows, the older sums are rescaled::

    s = c * q k^T              m' = max(m, rowmax(s))          p = exp2(s - m')
    l = l * exp2(m - m') + rowsum(p)                           acc = acc * exp2(m - m') + p v
    out = acc / l              lse = ln(2) * (m + log2(l))

The backward recomputes p = exp(score - lse). With delta = rowsum(dout * out) - dlse, where dlse is the gradient of lse,
ds = p * (dout v^T - delta) and

    dq = softmax_scale * ds k      dk = softmax_scale * ds^T q      dv = p^T dout

The backward has two kernels, without atomics, so that its sums have one order. The first computes dq over tiles of
rows, and stores delta for the second. The second computes dk and dv over tiles of keys, through all heads that share
the keys.

Three questions have separate answers. The tables of `tiles` say which tiles exist; kernels read them at run time, so no
schedule is compiled into a kernel. `_visible` says which elements of a tile are visible; it is used only in the last
blocks of a tile. `_softmax_step` is the softmax. Blocks that are visible as a whole are handled by a loop of their own,
without predicates.

NaN and infinite elements reach the rows that see them. If small scales share a tile, such elements may also reach rows
of an earlier one of these scales, because 0 * NaN is NaN, as in PyTorch's attention with a mask.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
import triton
import triton.language as tl

from .._checks import check, check_same, check_shape
from . import configs
from .launch import launch
from .targets import target_of
from .tiles import device_table, key_tiles, query_tiles

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_REST = tl.constexpr(1.925963033500681e-08)  # log2(e) minus its value in float32
LN_2 = tl.constexpr(0.6931471805599453)

# Sizes and strides differ between schedules and batches, so kernels are not specialised on them. The constexpr
# STRIDE_UNIT divides all strides, and they are passed divided by it: this tells the compiler how wide an access may be.
_RUNTIME = [
    *(f"{x}_{dim}" for x in ("q", "k", "v", "out", "dout", "dq", "dk", "dv") for dim in ("batch", "head", "row")),
    "heads", "group", "q_offset", "queries", "tiles", "pairs", "section",
]  # fmt: skip


# ---- where a tile is


@triton.jit
def _program(tiles, pairs, section):
    """The table row of this program and its pair of batch and head.

    The tables begin with the tiles that have the most work, so all heads start with those. A section is the pairs that
    share the L2 cache, and sections come one after another. Otherwise each of a thousand heads would read its keys from
    memory, not from the L2 cache, at every tile.
    """
    program = tl.program_id(0)
    first = program // (tiles * section) * section
    width = tl.minimum(section, pairs - first)
    within = program - first * tiles
    return within // width, first + within % width


@triton.jit
def _table_row(table, tile):
    row = table + tile * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _head(tensor, batch, head, batch_stride, head_stride, STRIDE_UNIT: tl.constexpr):
    return tensor + (batch * batch_stride.to(tl.int64) + head * head_stride.to(tl.int64)) * STRIDE_UNIT


@triton.jit
def _offsets(row_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_UNIT: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    return rows * row_stride * STRIDE_UNIT + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(head, first, count, row_stride, WHOLE: tl.constexpr,
          ROWS: tl.constexpr, BLOCK_D: tl.constexpr, DIM: tl.constexpr, STRIDE_UNIT: tl.constexpr):  # fmt: skip
    """Loads (ROWS, BLOCK_D), the rows of a head from `first` on. Columns from DIM on are zero, and so are rows from
    `count` on unless WHOLE."""
    start = head + first * row_stride.to(tl.int64) * STRIDE_UNIT
    pointers = start + _offsets(row_stride, ROWS, BLOCK_D, STRIDE_UNIT)
    row_inside = tl.arange(0, ROWS)[:, None] < count
    column_inside = tl.arange(0, BLOCK_D)[None, :] < DIM
    if WHOLE and DIM == BLOCK_D:
        return tl.load(pointers)
    elif WHOLE:
        return tl.load(pointers, mask=column_inside, other=0.0)
    elif DIM == BLOCK_D:
        return tl.load(pointers, mask=row_inside, other=0.0)
    else:
        return tl.load(pointers, mask=row_inside & column_inside, other=0.0)


@triton.jit
def _store(head, first, count, row_stride, values,
           ROWS: tl.constexpr, BLOCK_D: tl.constexpr, DIM: tl.constexpr, STRIDE_UNIT: tl.constexpr):  # fmt: skip
    start = head + first * row_stride.to(tl.int64) * STRIDE_UNIT
    pointers = start + _offsets(row_stride, ROWS, BLOCK_D, STRIDE_UNIT)
    inside = tl.arange(0, ROWS)[:, None] < count
    if DIM != BLOCK_D:
        inside = inside & (tl.arange(0, BLOCK_D)[None, :] < DIM)
    tl.store(pointers, values.to(head.dtype.element_ty), mask=inside)


# ---- which elements are visible, and the softmax


@triton.jit
def _visible(ends, keys):
    """Which keys each row sees. `ends`: the number of keys that each row sees, 0 for rows that do not exist."""
    return keys < ends


@triton.jit
def _softmax_step(scores, scale_log2, peak, total):
    """p of a block, the new maximum and sum of each row, and the factor that rescales the earlier sums."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    # If the maximum is -inf (all scores so far are -inf) or inf, a difference inf - inf would be NaN, but exp2(-inf) =
    # 0 and exp2(inf) = inf are wanted. Subtracting 0 gives these, and with them PyTorch's results, out = 0/0 and lse =
    # -inf or inf.
    shift = tl.where(tl.abs(new_peak) == float("inf"), 0.0, new_peak)
    p = tl.exp2(scores * scale_log2 - shift[:, None])
    factor = tl.exp2(peak - shift)
    return p, new_peak, total * factor + tl.sum(p, 1), factor


@triton.jit
def _exponent(scores, scale_log2, lse, input_type: tl.constexpr):
    """log2(p) = scale_log2 * scores - log2(e) * lse. In fp32 the last product is kept as a sum of two numbers: rounded
    to one number, it would change p by 5e-6 where logits are 100. An infinite lse has no second part."""
    high = lse * LOG2_E
    exponent = scores * scale_log2 - high
    if input_type == tl.float32:
        low = tl.fma(lse, LOG2_E, -high) + lse * LOG2_E_REST
        exponent -= tl.where(tl.abs(high) == float("inf"), 0.0, low)
    return exponent


# ---- forward


@triton.jit
def _attend(acc, peak, total, q, k_head, v_head, ends, first, last, k_row, v_row, scale_log2, WHOLE: tl.constexpr,
            BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DIM: tl.constexpr, STRIDE_UNIT: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """Adds the keys from `first` to `last` to a tile's rows. WHOLE: they are whole blocks that all rows see."""
    for start in range(first, last, BLOCK_N):
        k = _load(k_head, start, last - start, k_row, WHOLE, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not WHOLE:
            scores = tl.where(_visible(ends[:, None], start + tl.arange(0, BLOCK_N)[None, :]), scores, float("-inf"))
        p, peak, total, factor = _softmax_step(scores, scale_log2, peak, total)
        v = _load(v_head, start, last - start, v_row, WHOLE, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT)
        acc = tl.dot(p.to(v.dtype), v, acc * factor[:, None], input_precision=PRECISION)
    return acc, peak, total


@triton.jit(do_not_specialize=_RUNTIME)
def forward(q, k, v, out, lse, table, token_ends, scale_log2,
            q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
            heads, group, q_offset, queries, tiles, pairs, section,
            DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_UNIT: tl.constexpr, PRECISION: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out and lse of one tile of rows."""
    tile, pair = _program(tiles, pairs, section)
    first, count, common, limit = _table_row(table, tile)
    batch, head = pair // heads, pair % heads
    q_base = _head(q, batch, head, q_batch, q_head, STRIDE_UNIT)
    k_base = _head(k, batch, head // group, k_batch, k_head, STRIDE_UNIT)
    v_base = _head(v, batch, head // group, v_batch, v_head, STRIDE_UNIT)
    q_tile = _load(q_base, first, count, q_row, False, BLOCK_M, BLOCK_D, DIM, STRIDE_UNIT)
    rows = tl.arange(0, BLOCK_M)
    ends = tl.load(token_ends + q_offset + first + rows, mask=rows < count, other=0)

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole = common // BLOCK_N * BLOCK_N
    acc, peak, total = _attend(acc, peak, total, q_tile, k_base, v_base, ends, 0, whole, k_row, v_row, scale_log2,
                               True, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT, PRECISION)  # fmt: skip
    acc, peak, total = _attend(acc, peak, total, q_tile, k_base, v_base, ends, whole, limit, k_row, v_row, scale_log2,
                               False, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT, PRECISION)  # fmt: skip

    out_base = _head(out, batch, head, out_batch, out_head, STRIDE_UNIT)
    _store(out_base, first, count, out_row, acc * (1.0 / total)[:, None], BLOCK_M, BLOCK_D, DIM, STRIDE_UNIT)
    shift = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    row_lse = shift * LN_2 + tl.log2(total) * LN_2
    tl.store(lse + pair.to(tl.int64) * queries + first + rows, row_lse, mask=rows < count)


# ---- backward: dq, row by row, and delta


@triton.jit
def _add_dq(acc, q, dout, lse, delta, k_head, v_head, ends, first, last, k_row, v_row, scale_log2,
            WHOLE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DIM: tl.constexpr,
            STRIDE_UNIT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    for start in range(first, last, BLOCK_N):
        k = _load(k_head, start, last - start, k_row, WHOLE, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT)
        v = _load(v_head, start, last - start, v_row, WHOLE, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        exponent = _exponent(scores, scale_log2, lse[:, None], k.dtype)
        if not WHOLE:
            visible = _visible(ends[:, None], start + tl.arange(0, BLOCK_N)[None, :])
            exponent = tl.where(visible, exponent, float("-inf"))
        p = tl.exp2(exponent)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=_RUNTIME)
def backward_queries(q, k, v, out, dout, lse, dlse, dq, delta, table, token_ends, softmax_scale, scale_log2,
                     q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                     out_batch, out_head, out_row, dout_batch, dout_head, dout_row, dq_batch, dq_head, dq_row,
                     heads, group, q_offset, queries, tiles, pairs, section,
                     HAS_DLSE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_UNIT: tl.constexpr,
                     PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dq and delta of one tile of rows."""
    tile, pair = _program(tiles, pairs, section)
    first, count, common, limit = _table_row(table, tile)
    batch, head = pair // heads, pair % heads
    q_base = _head(q, batch, head, q_batch, q_head, STRIDE_UNIT)
    k_base = _head(k, batch, head // group, k_batch, k_head, STRIDE_UNIT)
    v_base = _head(v, batch, head // group, v_batch, v_head, STRIDE_UNIT)
    out_base = _head(out, batch, head, out_batch, out_head, STRIDE_UNIT)
    dout_base = _head(dout, batch, head, dout_batch, dout_head, STRIDE_UNIT)
    q_tile = _load(q_base, first, count, q_row, False, BLOCK_M, BLOCK_D, DIM, STRIDE_UNIT)
    out_tile = _load(out_base, first, count, out_row, False, BLOCK_M, BLOCK_D, DIM, STRIDE_UNIT)
    dout_tile = _load(dout_base, first, count, dout_row, False, BLOCK_M, BLOCK_D, DIM, STRIDE_UNIT)
    rows = tl.arange(0, BLOCK_M)
    inside = rows < count
    ends = tl.load(token_ends + q_offset + first + rows, mask=inside, other=0)

    statistics = pair.to(tl.int64) * queries + first + rows
    row_delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if HAS_DLSE:
        row_delta -= tl.load(dlse + statistics, mask=inside, other=0.0)
    tl.store(delta + statistics, row_delta, mask=inside)
    row_lse = tl.load(lse + statistics, mask=inside, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    whole = common // BLOCK_N * BLOCK_N
    acc = _add_dq(acc, q_tile, dout_tile, row_lse, row_delta, k_base, v_base, ends, 0, whole, k_row, v_row,
                  scale_log2, True, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT, PRECISION)  # fmt: skip
    acc = _add_dq(acc, q_tile, dout_tile, row_lse, row_delta, k_base, v_base, ends, whole, limit, k_row, v_row,
                  scale_log2, False, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT, PRECISION)  # fmt: skip
    dq_base = _head(dq, batch, head, dq_batch, dq_head, STRIDE_UNIT)
    _store(dq_base, first, count, dq_row, acc * softmax_scale, BLOCK_M, BLOCK_D, DIM, STRIDE_UNIT)


# ---- backward: dk and dv, key by key


@triton.jit(do_not_specialize=_RUNTIME)
def backward_keys(q, k, v, dout, lse, delta, dk, dv, table, token_ends, softmax_scale, scale_log2,
                  q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
                  dout_batch, dout_head, dout_row, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
                  heads, group, q_offset, queries, tiles, pairs, section,
                  DIM: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_UNIT: tl.constexpr, PRECISION: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dk and dv of one tile of keys; `pairs` are pairs of batch and key head, `heads` the number of key heads.

    Blocks are transposed, (keys, rows), because p^T and ds^T are multiplied by dout and q.
    """
    tile, pair = _program(tiles, pairs, section)
    first, count, common, limit = _table_row(table, tile)
    batch, kv_head = pair // heads, pair % heads
    k_base = _head(k, batch, kv_head, k_batch, k_head, STRIDE_UNIT)
    v_base = _head(v, batch, kv_head, v_batch, v_head, STRIDE_UNIT)
    k_tile = _load(k_base, first, count, k_row, False, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT)
    v_tile = _load(v_base, first, count, v_row, False, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT)
    keys = first + tl.arange(0, BLOCK_N)

    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    q_base = _head(q, batch, kv_head * group, q_batch, q_head, STRIDE_UNIT)
    dout_base = _head(dout, batch, kv_head * group, dout_batch, dout_head, STRIDE_UNIT)
    statistics = pair.to(tl.int64) * group * queries
    # One loop goes over the rows of all heads of the group, and a branch decides whether to mask. Nested loops, or a
    # loop with and one without a mask, would keep more addresses in registers than dk and dv leave free.
    blocks = tl.cdiv(queries - limit, BLOCK_M)
    for block in range(0, group * blocks):
        member = block // blocks
        start = limit + (block - member * blocks) * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < queries
        q_tile = _load(q_base + member * q_head.to(tl.int64) * STRIDE_UNIT, start, queries - start, q_row, False,
                       BLOCK_M, BLOCK_D, DIM, STRIDE_UNIT)  # fmt: skip
        dout_tile = _load(dout_base + member * dout_head.to(tl.int64) * STRIDE_UNIT, start, queries - start, dout_row,
                          False, BLOCK_M, BLOCK_D, DIM, STRIDE_UNIT)  # fmt: skip
        # Rows that do not exist get p = exp(-inf) = 0.
        row_lse = tl.load(lse + statistics + member * queries + rows, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + statistics + member * queries + rows, mask=inside, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        exponent = _exponent(scores, scale_log2, row_lse[None, :], k_tile.dtype)
        if start < common:
            ends = tl.load(token_ends + q_offset + rows, mask=inside, other=0)
            exponent = tl.where(_visible(ends[None, :], keys[:, None]), exponent, float("-inf"))
        p = tl.exp2(exponent)
        dv_tile = tl.dot(p.to(dout_tile.dtype), dout_tile, dv_tile, input_precision=PRECISION)
        ds = p * (tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION) - row_delta[None, :])
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=PRECISION)

    dk_base = _head(dk, batch, kv_head, dk_batch, dk_head, STRIDE_UNIT)
    dv_base = _head(dv, batch, kv_head, dv_batch, dv_head, STRIDE_UNIT)
    _store(dk_base, first, count, dk_row, dk_tile * softmax_scale, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT)
    _store(dv_base, first, count, dv_row, dv_tile, BLOCK_N, BLOCK_D, DIM, STRIDE_UNIT)


# ---- launch

# The keys and values of a section, or its queries and dout, take less than half of the L2 cache of an A100, H100 or
# B200.
_SECTION_BYTES = 16 << 20

# Offsets inside a tile, which has at most 256 rows, are 32-bit numbers: 64 bits cost up to 40 registers per thread.
_FAR = (1 << 31) // 256


def _needs_copies(*tensors: torch.Tensor) -> bool:
    """Whether rows are further apart than the kernels' offsets reach, or a result of empty_like would not be dense in
    its last dimension, which happens where the input overlaps itself."""
    return any([(x.stride(2) >= _FAR and x.shape[2] > 1) or (x.stride(3) != 1 and x.shape[3] > 1) for x in tensors])


def _padding(q: torch.Tensor) -> int:
    """The number of columns to add to wide heads whose rows are not whole 16-byte vectors (a head dimension of 126 is
    in use). Without them, predicates and narrow accesses would cost more than the copies, and too many registers."""
    return -q.shape[3] % (16 // q.element_size()) if q.shape[3] > 64 else 0


def _copies(padding: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [torch.nn.functional.pad(x.contiguous(), (0, padding)) for x in tensors]


def _strides(**tensors: torch.Tensor) -> dict[str, int]:
    """The strides of each tensor (B, H, L, D) as kernel arguments, and the unit in which they are given: the largest
    power of two, up to 16 bytes, that divides them all."""
    strides = {
        f"{name}_{dim}": stride if size > 1 else 0
        for name, x in tensors.items()
        for dim, size, stride in zip(("batch", "head", "row"), x.shape, x.stride(), strict=False)
    }
    widest = 16 // next(iter(tensors.values())).element_size()
    unit = reduce(math.gcd, strides.values(), widest)
    return {**{name: stride // unit for name, stride in strides.items()}, "STRIDE_UNIT": unit}


def _check(q, k, v, scale_lens, q_offset, **like_q) -> None:
    """Raises if the arguments of a raw op disagree about a size, because a kernel would then read out of bounds."""
    batch, heads, queries, dim = q.shape
    check_shape("k", k, (batch, k.shape[1], k.shape[2], dim))
    check_shape("v", v, k.shape)
    check(k.shape[1] > 0 and heads % k.shape[1] == 0, "k", f"a number of heads that divides {heads}", k.shape[1])
    check(min(scale_lens, default=0) > 0, "scale_lens", "lengths > 0", scale_lens)
    check(sum(scale_lens) == k.shape[2], "scale_lens", f"the sum {k.shape[2]}", scale_lens)
    check(0 <= q_offset <= k.shape[2] - queries, "q_offset", f"0 to {k.shape[2]} - {queries}", q_offset)
    for name, x in like_q.items():
        check_shape(name, x, q.shape)
    for name, x in {"q": q, "k": k, "v": v, **like_q}.items():
        dense = x.stride(3) == 1 or x.shape[3] == 1 or x.numel() == 0
        check(dense, name, "a dense last dimension", f"strides {x.stride()}")
    check_same("q", q, k=k, v=v, **like_q)


def _start(kernel, q, k, scale_lens, q_offset, allow_tf32, tensors, others: dict[str, object]) -> None:
    """Starts `kernel` over the tiles of rows or keys. `tensors` are (B, H, L, D); `others` are for this kernel only."""
    (batch, heads, queries, dim), (kv_heads, keys) = q.shape, k.shape[1:3]
    target = target_of(q.device)
    block_d = max(16, triton.next_power_of_2(dim))
    strides, itemsize = _strides(**tensors), q.element_size()
    # Accesses of less than 16 bytes take more registers for addresses, so such rows get the tiles of twice the columns.
    size = block_d if strides["STRIDE_UNIT"] * itemsize == 16 else min(2 * block_d, 256)
    config = configs.choose(f"block_causal_attention.{kernel.fn.__name__}", target, size, itemsize)
    rows, columns = config.tiles["BLOCK_M"], config.tiles["BLOCK_N"]
    group = heads // kv_heads
    if kernel is backward_keys:
        table = device_table(key_tiles, scale_lens, q_offset, queries, columns, rows, q.device)
        heads, streamed = kv_heads, queries * group
    else:
        table = device_table(query_tiles, scale_lens, q_offset, queries, rows, columns, q.device)
        streamed = keys // group
    tiles, pairs = table.tiles.shape[0], batch * heads
    section = min(pairs, max(1, _SECTION_BYTES // (2 * max(streamed, 1) * dim * q.element_size())))
    tf32 = target.api == "cuda" and q.dtype == torch.float32 and allow_tf32
    arguments = {
        **tensors, **others, **strides, "table": table.tiles, "token_ends": table.ends,
        "heads": heads, "group": group, "q_offset": q_offset, "queries": queries,
        "tiles": tiles, "pairs": pairs, "section": section,
        "DIM": dim, "BLOCK_D": block_d, "PRECISION": "tf32" if tf32 else "ieee",
    }  # fmt: skip
    launch(kernel, (tiles * pairs,), arguments, config)


def block_causal_attention(q, k, v, scale_lens, softmax_scale, q_offset, allow_tf32=False, lens=None):
    scale_lens = scale_lens if lens is None else lens.tolist()
    _check(q, k, v, scale_lens, q_offset)
    out = torch.empty_like(q)
    padding = _padding(q)
    if q.numel() and (padding or _needs_copies(q, k, v, out)):
        copies = _copies(padding, q, k, v)
        result, lse = block_causal_attention(*copies, scale_lens, softmax_scale, q_offset, allow_tf32)
        return out.copy_(result[..., : q.shape[3]]), lse
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    if softmax_scale < 0:  # otherwise the maximum of the scores would be the minimum of the scaled ones
        q, softmax_scale = -q, -softmax_scale
    # Never zero, because an invisible score is -inf, and -inf times zero would be NaN.
    scale_log2 = max(softmax_scale * LOG2_E.value, 1e-30)
    tensors = {"q": q, "k": k, "v": v, "out": out}
    _start(forward, q, k, scale_lens, q_offset, allow_tf32, tensors, {"lse": lse, "scale_log2": scale_log2})
    return out, lse


def block_causal_attention_backward(
    dout, q, k, v, out, lse, dlse, scale_lens, softmax_scale, q_offset, allow_tf32=False, lens=None
):
    scale_lens = scale_lens if lens is None else lens.tolist()
    _check(q, k, v, scale_lens, q_offset, out=out, dout=dout)
    for name, x in (("lse", lse), *([] if dlse is None else [("dlse", dlse)])):
        check_shape(name, x, q.shape[:3])
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    padding = _padding(q)
    if q.numel() and (padding or _needs_copies(dout, q, k, v, out, dq, dk, dv)):
        copies = _copies(padding, dout, q, k, v, out)
        results = block_causal_attention_backward(*copies, lse, dlse, scale_lens, softmax_scale, q_offset, allow_tf32)
        return tuple(to.copy_(result[..., : q.shape[3]]) for to, result in zip((dq, dk, dv), results, strict=True))
    if lse.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    scales = {"softmax_scale": softmax_scale, "scale_log2": softmax_scale * LOG2_E.value}
    statistics = {"lse": lse, "delta": delta, **scales}
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "dq": dq}
    gradient = {"dlse": lse if dlse is None else dlse.contiguous(), "HAS_DLSE": dlse is not None}
    _start(backward_queries, q, k, scale_lens, q_offset, allow_tf32, tensors, {**statistics, **gradient})
    tensors = {"q": q, "k": k, "v": v, "dout": dout, "dk": dk, "dv": dv}
    _start(backward_keys, q, k, scale_lens, q_offset, allow_tf32, tensors, statistics)
    return dq, dk, dv
