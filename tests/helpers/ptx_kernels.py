"""Triton kernels for the tests of the PTX interpreter, with many of the instructions that Triton emits for sm_80."""

import triton
import triton.language as tl


@triton.jit
def attention(q_ptr, k_ptr, v_ptr, o_ptr, scale, length, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Full attention; the second grid index is the head. It has pipelined loads, two products and an online softmax."""
    base = tl.program_id(1) * length * D
    rows, dims = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    here = rows[:, None] * D + dims[None, :]
    q = tl.load(q_ptr + base + here, mask=rows[:, None] < length, other=0.0)
    maximum = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, D], tl.float32)
    for start in range(0, length, BN):
        columns = start + tl.arange(0, BN)
        k = tl.load(k_ptr + base + columns[None, :] * D + dims[:, None], mask=columns[None, :] < length, other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        scores = tl.where(columns[None, :] < length, scores, -float("inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        weights, rescale = tl.exp2(scores - larger[:, None]), tl.exp2(maximum - larger)
        total = total * rescale + tl.sum(weights, 1)
        v = tl.load(v_ptr + base + columns[:, None] * D + dims[None, :], mask=columns[:, None] < length, other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * rescale[:, None], input_precision=PRECISION)
        maximum = larger
    tl.store(o_ptr + base + here, (sums / total[:, None]).to(o_ptr.dtype.element_ty), mask=rows[:, None] < length)


@triton.jit
def layer_norm(x_ptr, y_ptr, rows, width, eps, BLOCK: tl.constexpr):
    """Each of n programs normalises every n-th row in a while loop."""
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    row = tl.program_id(0)
    while row < rows:
        x = tl.load(x_ptr + row.to(tl.int64) * width + columns, mask=inside, other=0.0,
                    eviction_policy="evict_first").to(tl.float32)  # fmt: skip
        centred = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
        scale = 1 / tl.sqrt_rn(tl.sum(centred * centred, 0) / width + eps)
        tl.store(y_ptr + row.to(tl.int64) * width + columns, (centred * scale).to(y_ptr.dtype.element_ty), mask=inside)
        row += tl.num_programs(0)


@triton.jit
def nearest(z_ptr, codes_ptr, index_ptr, count, size, C: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """The first nearest code of each row: reductions of (value, index) pairs."""
    rows, dims = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, C)
    z = tl.load(z_ptr + rows[:, None] * C + dims[None, :], mask=rows[:, None] < count, other=0.0)
    best, chosen = tl.full([BM], float("inf"), tl.float32), tl.zeros([BM], tl.int32)
    for start in range(0, size, BV):
        codes = start + tl.arange(0, BV)
        e = tl.load(codes_ptr + codes[:, None] * C + dims[None, :], mask=codes[:, None] < size, other=0.0)
        distance = tl.sum(e * e, 1)[None, :] - 2 * tl.dot(z, tl.trans(e), input_precision=PRECISION)
        distance = tl.where(codes[None, :] < size, distance, float("inf"))
        smallest, where = tl.min(distance, 1, return_indices=True)
        closer = smallest < best
        best, chosen = tl.where(closer, smallest, best), tl.where(closer, where + start, chosen)
    tl.store(index_ptr + rows, chosen.to(tl.int64), mask=rows < count)


@triton.jit
def gather(x_ptr, index_ptr, y_ptr, sums_ptr, count, size, BLOCK: tl.constexpr):
    """A gather by 64-bit indices (negative ones count from the end), functions, integer division and atomics."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    j = tl.load(index_ptr + i, mask=inside, other=0)
    j = tl.where(j < 0, j + size, j)
    x = tl.load(x_ptr + j, mask=inside & (j < size), other=0.0).to(tl.float32)
    y = tl.exp(x) + tl.log(tl.abs(x) + 1) + tl.sin(x) + tl.cos(100000 * x) + tl.erf(x) + tl.floor(x)
    y = tl.div_rn(y, 3.0) + (i // 7).to(tl.float32) + i % 5
    tl.store(y_ptr + i, y, mask=inside)
    tl.atomic_add(sums_ptr + i % 16, x, mask=inside)


@triton.jit
def narrow(x_ptr, y_ptr, sorted_ptr, running_ptr, arg_ptr, count, BLOCK: tl.constexpr):
    """Arithmetic, a sort, a scan and an argmin on the elements of a narrow type."""
    i = tl.arange(0, BLOCK)
    inside = i < count
    x = tl.load(x_ptr + i, mask=inside, other=0.0)
    y = x + x * x
    wide = y.to(tl.float32)
    tl.store(y_ptr + i, tl.maximum(y, x), mask=inside)
    tl.store(sorted_ptr + i, tl.sort(wide))
    tl.store(running_ptr + i, tl.cumsum(wide, 0))
    tl.store(arg_ptr, tl.argmin(wide, 0))
