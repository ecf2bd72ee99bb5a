"""The PTX interpreter: memory spaces, asynchronous copies, warps, control flow, barriers, parsing."""

import struct

import numpy as np
import pytest

from tests.helpers.ptx_snippets import HEADER, compute, launch
from tools.gpu_emulation.ptx import Memory, PtxError, parse, run

POINTERS = ".param .u64 a, .param .u64 b"
LOAD_POINTERS = "ld.param.u64 %d0, [a]; ld.param.u64 %d1, [b]; mov.u32 %t0, %tid.x;"


def on_arrays(body: str, a: np.ndarray, b: np.ndarray, **options):
    """Runs `body` with the addresses of two arrays in %d0 and %d1, and the thread in %t0."""
    memory = Memory()
    for name, array in (("a", a), ("b", b)):
        memory.add(name, array)
    arguments = [a.ctypes.data, b.ctypes.data]
    return launch(LOAD_POINTERS + body + " ret;", arguments, parameters=POINTERS, memory=memory, **options)


# ---- Loads and stores


def test_vector_loads_and_stores():
    a, b = np.arange(512, dtype=np.uint32), np.zeros(512, np.uint32)
    on_arrays(
        """mad.wide.u32 %d2, %t0, 16, %d0; mad.wide.u32 %d3, %t0, 16, %d1;
        ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%d2]; ld.global.nc.v2.b64 {%d4, %d5}, [%d2];
        st.global.v4.b32 [%d3], {%r3, %r2, %r1, %r0}; st.global.v2.b32 [%d3 + 1024], {%r1, 5};
        ld.global.L1::evict_last.v4.b16 {%h0, %h1, %h2, _}, [%d2+8]; st.global.b16 [ %d3 + 1032 ], %h2;
        st.global.b64 [%d3+512], %d5;""",
        a, b,
    )  # fmt: skip
    rows = a[:128].reshape(32, 4)
    assert np.array_equal(b[:128].reshape(32, 4), rows[:, ::-1])
    assert np.array_equal(b[128:256].reshape(32, 4)[:, :2], rows[:, 2:])
    assert np.array_equal(b[256:384].reshape(32, 4)[:, 0], rows[:, 1])
    assert (b[256:384].reshape(32, 4)[:, 1] == 5).all()
    assert np.array_equal(b[256:384].reshape(32, 4)[:, 2], rows[:, 3] & 0xFFFF)


def test_narrow_loads_extend_and_narrow_stores_truncate():
    a, b = np.arange(-16, 16, dtype=np.int8), np.zeros(32, np.uint8)
    signed, unsigned = np.zeros(32, np.int32), np.zeros(32, np.uint32)
    memory = Memory()
    arrays = [a, b, signed, unsigned]
    for name, array in zip("abcd", arrays, strict=True):
        memory.add(name, array)
    body = """ld.param.u64 %d2, [c]; ld.param.u64 %d3, [d]; cvt.u64.u32 %d4, %t0; add.s64 %d5, %d0, %d4;
        add.s64 %d6, %d1, %d4; ld.global.s8 %r0, [%d5]; ld.global.u8 %h1, [%d5]; cvt.u32.u16 %r1, %h1;
        mad.wide.u32 %d2, %t0, 4, %d2; mad.wide.u32 %d3, %t0, 4, %d3;
        st.global.u8 [%d6], %r0; st.global.b32 [%d2], %r0; st.global.b32 [%d3], %r1; ret;"""
    parameters = ", ".join(f".param .u64 {name}" for name in "abcd")
    launch(LOAD_POINTERS + body, [x.ctypes.data for x in arrays], parameters=parameters, memory=memory)
    assert (
        np.array_equal(signed, a) and np.array_equal(unsigned, a.view(np.uint8)) and np.array_equal(b, a.view(np.uint8))
    )


def test_parameters_of_every_type():
    out = np.zeros(4, np.float64)
    memory = Memory()
    memory.add("out", out)
    body = """ld.param.u64 %d0, [p]; ld.param.s8 %r1, [q]; ld.param.b32 %r2, [r]; ld.param.f64 %d3, [s];
        cvt.rn.f64.s32 %d1, %r1; cvt.f64.f32 %d2, %r2; st.global.f64 [%d0], %d1; st.global.f64 [%d0+8], %d2;
        st.global.f64 [%d0+16], %d3; ld.param.u16 %h0, [t]; cvt.rn.f64.u16 %d4, %h0; st.global.f64 [%d0+24], %d4;
        ret;"""
    parameters = ".param .u64 .ptr .global .align 1 p, .param .s8 q, .param .f32 r, .param .f64 s, .param .u16 t"
    launch(body, [out.ctypes.data, -3, 0.5, 0.1, 65535], parameters=parameters, memory=memory)
    assert out.tolist() == [-3, 0.5, 0.1, 65535]


def test_structures_passed_by_value():
    out = np.zeros(2, np.float32)
    memory = Memory()
    memory.add("out", out)
    body = """ld.param.v2.b32 {%r0, %r1}, [s]; ld.param.u64 %d0, [s+8]; cvt.rn.f32.s32 %r1, %r1;
        st.global.v2.b32 [%d0], {%r0, %r1}; ret;"""
    value = struct.pack("fiQ", 0.5, -3, out.ctypes.data)
    launch(body, [value], parameters=".param .align 8 .b8 s[16]", memory=memory)
    assert out.tolist() == [0.5, -3]


def test_indexed_parameters():
    out = np.zeros(4, np.int32)
    memory = Memory()
    memory.add("out", out)
    body = """mov.b64 %d1, s; mov.u32 %t0, %tid.x; mul.wide.u32 %d2, %t0, 4; sub.s64 %d3, %d1, %d2;
        ld.param.u64 %d0, [s]; ld.param.u32 %r0, [%d3+20]; add.s64 %d0, %d0, %d2; st.global.u32 [%d0], %r0; ret;"""
    options = {"parameters": ".param .u32 n, .param .align 8 .b8 s[24]", "memory": memory}
    value = struct.pack("Q4i", out.ctypes.data, 7, 8, 9, 10)
    launch(body, [1, value], threads=(4, 1, 1), **options)
    assert out.tolist() == [10, 9, 8, 7]
    for wrong in ("[%d3+32]", "[%d3+18]"):
        with pytest.raises(PtxError, match="of parameters of 48 bytes"):
            launch(body.replace("[%d3+20]", wrong), [1, value], threads=(4, 1, 1), **options)


def test_static_dynamic_and_module_variables():
    declarations = """.extern .shared .align 16 .b8 dynamic[]; .shared .align 4 .b8 first[64];
        .const .align 4 .u32 table[3] = {5, 6, 7}; .global .align 4 .f32 scale = 0f40000000;"""
    body = """.shared .align 16 .b8 second[32]; .local .align 4 .b8 depot[8]; .reg .b32 %SP;
        mov.b32 %r0, dynamic; mov.u32 %r1, second; mov.b32 %SP, depot; mov.b32 %r9, first;
        setp.eq.u32 %p0, %t0, 0; @%p0 st.shared.b32 [first+60], 1; @%p0 st.shared.b32 [%r1+28], 2;
        @%p0 st.shared.b32 [%r0], 3; bar.sync 0; ld.shared.b32 %r2, [%r9+60]; ld.shared.b32 %r3, [second+28];
        ld.shared.b32 %r4, [dynamic]; mad.lo.u32 %r2, %r3, 10, %r2; mad.lo.u32 %r2, %r4, 100, %r2;
        st.local.b32 [%SP+4], %t0; st.local.b32 [depot], %r2; ld.local.b32 %r5, [%SP]; ld.local.b32 %r6, [depot+4];
        add.u32 %r5, %r5, %r6; mov.b64 %d5, table; ld.const.u32 %r7, [%d5+8]; add.u32 %r5, %r5, %r7;
        ld.global.f32 %r8, [scale]; cvt.rzi.u32.f32 %r8, %r8; mul.lo.u32 %r5, %r5, %r8;
        mad.wide.u32 %d2, %t0, 4, %d1; st.global.b32 [%d2], %r5;"""
    a, b = np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    on_arrays(body, a, b, threads=(64, 1, 1), shared_bytes=16, declarations=declarations)
    assert b.tolist() == [2 * (321 + i + 7) for i in range(64)]


def test_generic_addresses():
    declarations = ".shared .align 8 .b8 box[256];"
    body = """.local .align 8 .b8 own[8]; mad.wide.u32 %d2, %t0, 4, %d0; mul.wide.u32 %d3, %t0, 8; mov.b64 %d4, box;
        cvta.shared.u64 %d4, %d4; add.s64 %d4, %d4, %d3; ld.b32 %r0, [%d2]; st.b32 [%d4], %r0; mov.b64 %d5, own;
        cvta.local.u64 %d5, %d5; st.b32 [%d5], 40; ld.b32 %r3, [%d5]; cvta.to.shared.u64 %d6, %d4;
        ld.shared.b32 %r1, [%d6]; ld.b32 %r2, [%d4]; add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3;
        mad.wide.u32 %d7, %t0, 4, %d1; cvta.to.global.u64 %d7, %d7; st.global.b32 [%d7], %r1;"""
    a, b = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    on_arrays(body, a, b, declarations=declarations)
    assert np.array_equal(b, 2 * a + 40)


def test_loads_may_mix_buffers():
    a, b = np.arange(16, dtype=np.uint32), np.zeros(64, np.uint32)
    b[:16] = np.arange(100, 116)
    body = """and.b32 %r0, %t0, 15; setp.lt.u32 %p0, %t0, 16; selp.b64 %d2, %d0, %d1, %p0;
        mad.wide.u32 %d2, %r0, 4, %d2; ld.global.b32 %r1, [%d2]; mad.wide.u32 %d3, %t0, 4, %d1;
        st.global.b32 [%d3+128], %r1;"""
    on_arrays(body, a, b)
    assert b[32:].tolist() == [*range(16), *range(100, 116)]


def test_atomics():
    a, b = np.zeros(4, np.float32), np.zeros(64, np.uint32)
    declarations = ".shared .align 4 .b8 count[8];"
    body = """setp.eq.u32 %p0, %t0, 0; @%p0 st.shared.v2.b32 [count], {0, 0}; bar.sync 0;
        cvt.rn.f32.u32 %r0, %t0; @!%p0 atom.global.gpu.acq_rel.add.f32 %r1, [%d0], %r0; red.global.max.s32 [%d1], %t0;
        atom.shared.inc.u32 %r2, [count], 1000; mad.wide.u32 %d2, %r2, 4, %d1; st.global.b32 [%d2+128], %t0;
        atom.shared.cas.b32 %r3, [count+4], 0, 9; setp.eq.u32 %p1, %r3, 0; @%p1 red.global.add.u32 [%d1+4], 1;
        atom.global.exch.b32 %r4, [%d1+8], %t0; red.global.or.b32 [%d1+12], %t0;"""
    on_arrays(body, a, b, declarations=declarations)
    assert a[0] == sum(range(32)) and b[:4].tolist() == [31, 1, 31, 31]
    assert sorted(b[32:].tolist()) == list(range(32))


def test_half_precision_atomics():
    a, b = np.zeros(8, np.float16), np.full(4, 0x3F80, np.uint16)
    body = """mov.b32 %r0, 0x3C003800; red.global.add.noftz.f16x2 [%d0], %r0; mov.b16 %h0, 0x3F80;
        red.global.add.noftz.bf16 [%d1], %h0;"""
    on_arrays(body, a, b)
    assert a[:2].tolist() == [16.0, 32.0] and b.tolist() == [0x4204, 0x3F80, 0x3F80, 0x3F80]


# ---- Asynchronous copies

DYNAMIC = ".extern .shared .align 16 .b8 buffer[];"
COPY = (
    "mad.wide.u32 %d2, %t0, 16, %d0; mad.wide.u32 %d3, %t0, 16, %d1; mad.lo.u32 %r0, %t0, 16, 0; mov.b32 %r9, buffer;"
)
COPY += " add.u32 %r0, %r0, %r9;"


def test_groups_retire_in_order():
    a, b = np.arange(256, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """cp.async.cg.shared.global [%r0], [%d2], 16; cp.async.commit_group;
        cp.async.cg.shared.global [ %r0 + 512 ], [ %d2 + 512 ], 0x10; cp.async.commit_group; cp.async.wait_group 1;
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r0]; cp.async.wait_group 0;
        ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r0+512]; add.u32 %r1, %r1, %r5;
        st.global.v4.b32 [%d3], {%r1, %r2, %r3, %r4};"""
    on_arrays(COPY + body, a, b, declarations=DYNAMIC, shared_bytes=1024)
    expected = a[:128].reshape(32, 4).copy()
    expected[:, 0] += a[128:].reshape(32, 4)[:, 0]
    assert np.array_equal(b.reshape(32, 4), expected)


def test_copies_fill_with_zeros():
    """Only the first `size` bytes of the source are read; with size 0 the address may be anything."""
    a, b = np.arange(1, 33, dtype=np.uint32), np.ones(128, np.uint32)
    body = """setp.lt.u32 %p0, %t0, 4; selp.b32 %r1, 16, 0, %p0; setp.eq.u32 %p1, %t0, 7; selp.b32 %r1, 8, %r1, %p1;
        cp.async.ca.shared.global [%r0], [%d2], 16, %r1; cp.async.wait_all;
        ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r0];
        st.global.v4.b32 [%d3], {%r1, %r2, %r3, %r4};"""
    on_arrays(COPY + body, a, b, declarations=DYNAMIC, shared_bytes=512)
    expected = np.zeros((32, 4), np.uint32)
    expected[:4] = a[:16].reshape(4, 4)
    expected[7, :2] = a[28:30]
    assert np.array_equal(b.reshape(32, 4), expected)


def test_groups_belong_to_each_thread():
    """With the same wait, lanes that have committed one group more retire a later group."""
    a, b = np.arange(256, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """cp.async.cg.shared.global [%r0], [%d2], 16; cp.async.commit_group; setp.lt.u32 %p0, %t0, 16;
        @%p0 bra later; cp.async.commit_group; cp.async.wait_group 1; bra read;
        later: cp.async.wait_group 0;
        read: ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r0]; st.global.v4.b32 [%d3], {%r1, %r2, %r3, %r4};"""
    on_arrays(COPY + body, a, b, declarations=DYNAMIC, shared_bytes=512)
    assert np.array_equal(b, a[:128])


# ---- Warps


def expected_shuffle(mode: str, lane: int, amount: int, clamp: int) -> tuple[int, bool]:
    """The source lane of a shuffle and whether it is valid, after the pseudocode of the instruction set."""
    segment, bound = clamp >> 8 & 31, clamp & 31
    amount &= 31
    highest, lowest = (lane & segment) | (bound & ~segment & 31), lane & segment
    if mode == "up":
        j = lane - amount
        inside = j >= highest
    else:
        j = {"down": lane + amount, "bfly": lane ^ amount, "idx": lowest | (amount & ~segment & 31)}[mode]
        inside = j <= highest
    return (j if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 8])
def test_shuffles(mode, width):
    clamp = (32 - width) << 8 | (0 if mode == "up" else 31)
    lanes = np.arange(64, dtype=np.uint32)
    for amount in (0, 1, 3, 8, 16, 31):
        body = f"shfl.sync.{mode}.b32 %o0|%p0, %i0, {amount}, {clamp}, -1; selp.b32 %o1, 1, 0, %p0;"
        values, inside = compute(body, lanes, out=[np.uint32] * 2)
        right = [expected_shuffle(mode, lane % 32, amount, clamp) for lane in range(64)]
        assert values.tolist() == [lane - lane % 32 + j for lane, (j, _) in enumerate(right)]
        assert inside.tolist() == [int(flag) for _, flag in right]
    (values,) = compute("shfl.sync.idx.b32 %o0, %i0, %i0, 31, 0xffffffff;", lanes[::-1].copy(), out=[np.uint32])
    assert values.tolist() == (lanes ^ 32).tolist()  # lane i reads lane 31 - i, which holds 32 + i or i - 32


def test_votes_and_reductions():
    lanes = np.arange(64, dtype=np.int32)
    body = """and.b32 %r0, %i0, 31; setp.lt.s32 %p0, %i0, 40; setp.lt.s32 %p1, %r0, 3;
        vote.sync.all.pred %p2, %p0, -1; vote.sync.any.pred %p3, !%p0, -1; vote.sync.uni.pred %p4, %p0, -1;
        vote.sync.ballot.b32 %o0, %p1, -1; activemask.b32 %o1; redux.sync.add.s32 %o2, %i0, -1;
        redux.sync.min.s32 %o3, %i0, -1; redux.sync.max.u32 %o4, %i0, -1; selp.b32 %o5, 1, 0, %p2;
        selp.b32 %r1, 2, 0, %p3; selp.b32 %r2, 4, 0, %p4; or.b32 %o5, %o5, %r1; or.b32 %o5, %o5, %r2;"""
    found = [part.reshape(2, 32) for part in compute(body, lanes, out=[np.uint32] * 6)]
    right = [[7, 7], [2**32 - 1] * 2, [sum(range(32)), sum(range(32, 64))], [0, 32], [31, 63], [5, 2]]
    for values, expected in zip(found, right, strict=True):
        assert (values == np.array(expected, np.uint32)[:, None]).all()


def test_ldmatrix():
    """Lane l receives elements 2 (l % 4) and + 1 of row l / 4 of each matrix; with .trans of column l / 4."""
    a, b = np.arange(256, dtype=np.uint16), np.zeros((32, 8), np.uint32)
    body = """mad.wide.u32 %d2, %t0, 16, %d0; mad.lo.u32 %r0, %t0, 16, 0; mov.b32 %r9, buffer; add.u32 %r0, %r0, %r9;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d2]; st.shared.v4.b32 [%r0], {%r1, %r2, %r3, %r4}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r0];
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r5, %r6}, [%r0];
        ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r7}, [%r0 + 128]; mad.wide.u32 %d3, %t0, 32, %d1;
        st.global.v4.b32 [%d3], {%r1, %r2, %r3, %r4}; st.global.v2.b32 [%d3+16], {%r5, %r6};
        st.global.b32 [%d3+24], %r7;"""
    # Lanes 8 ... of the last ldmatrix hold addresses past the end, which it does not use.
    on_arrays(body, a, b.reshape(-1), declarations=DYNAMIC, shared_bytes=512)
    matrices = a.reshape(4, 8, 8)
    for lane in range(32):
        row, pair = lane // 4, 2 * (lane % 4)

        def packed(matrix, row=row, pair=pair):
            return int(matrix[row, pair]) | int(matrix[row, pair + 1]) << 16

        assert b[lane, :4].tolist() == [packed(matrix) for matrix in matrices]
        assert b[lane, 4:6].tolist() == [packed(matrix.T) for matrix in matrices[:2]]
        assert b[lane, 6] == packed(matrices[1])


def fragments(kind: str, k: int):
    """The place of each lane's registers in A, B and C, from the tables of the instruction set.

    The places of a matrix are a list of (lane, register, element, row, column).
    """
    a, b, c = [], [], []
    for lane in range(32):
        group, thread = lane >> 2, lane & 3
        c += [(lane, i, 0, group + (8 if i >= 2 else 0), thread * 2 + (i & 1)) for i in range(4)]
        if kind == "tf32":
            for i in range(k // 2):
                a.append((lane, i, 0, group + (8 if i in (1, 3) else 0), thread + (4 if i >= 2 else 0)))
            b += [(lane, i, 0, thread + 4 * i, group) for i in range(k // 4)]
        else:
            for i in range(k // 2):  # elements a0 ... a7, two in a register
                row = group + (8 if i in (2, 3, 6, 7) else 0)
                a.append((lane, i // 2, i % 2, row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)))
            b += [(lane, i // 2, i % 2, thread * 2 + (i & 1) + (8 if i >= 2 else 0), group) for i in range(k // 4)]
    return a, b, c


@pytest.mark.parametrize("kind, k", [("bf16", 16), ("bf16", 8), ("f16", 16), ("f16", 8), ("tf32", 8), ("tf32", 4)])
def test_mma(kind, k):
    random = np.random.default_rng(0)
    left, right = random.integers(-8, 9, (16, k)) / 4, random.integers(-8, 9, (k, 8)) / 4
    base = random.integers(-8, 9, (16, 8)).astype(np.float32)
    words = {"bf16": lambda x: np.float32(x).view(np.uint32) >> 16, "f16": lambda x: np.float16(x).view(np.uint16)}
    # The hardware ignores the low 13 bits of a tf32 operand.
    encode = words.get(kind, lambda x: np.float32(x).view(np.uint32) | 0x1FFF)
    a, b, c = fragments(kind, k)
    inputs = np.zeros((10, 32), np.uint32)
    for first, layout, matrix in ((0, a, left), (4, b, right)):
        for lane, register, element, row, column in layout:
            inputs[first + register, lane] |= np.uint32(int(encode(matrix[row, column])) << 16 * element)
    for lane, register, _, row, column in c:
        inputs[6 + register, lane] = base[row, column].view(np.uint32)
    na, nb = max(r for _, r, *_ in a) + 1, max(r for _, r, *_ in b) + 1
    operands = [", ".join(f"%i{first + i}" for i in range(count)) for first, count in ((0, na), (4, nb), (6, 4))]
    body = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%o0, %o1, %o2, %o3}}, "
    found = compute(body + ", ".join(f"{{ {item} }}" for item in operands) + ";", *inputs, out=[np.float32] * 4)
    expected = left @ right + base
    for lane, register, _, row, column in c:
        assert found[register][lane] == expected[row, column]


# ---- Control flow


def test_divergent_branches_and_loops():
    x = np.arange(96, dtype=np.int32)
    body = """mov.b32 %o0, 0; mov.b32 %r0, %i0;
        loop: setp.le.s32 %p0, %r0, 0; @%p0 bra.uni done;
        and.b32 %r1, %r0, 1; setp.eq.s32 %p1, %r1, 0; @!%p1 bra odd;
        add.s32 %o0, %o0, %r0; bra next;
        odd: sub.s32 %o0, %o0, 1;
        next: sub.s32 %r0, %r0, 1; bra loop;
        done: mul.lo.s32 %o0, %o0, 2;"""
    (found,) = compute(body.replace("bra.uni done", "bra done"), x, out=[np.int32])
    right = [2 * (sum(i for i in range(1, n + 1) if i % 2 == 0) - (n + 1) // 2) for n in range(96)]
    assert found.tolist() == right


def test_lanes_meet_again_at_a_convergent_instruction():
    """Some lanes jump to a block behind the shuffle and from there back to the shuffle."""
    x = np.arange(32, dtype=np.int32)
    body = """setp.ge.s32 %p0, %i0, 16; mov.b32 %r0, %i0; @%p0 bra far;
        meet: shfl.sync.bfly.b32 %o0, %r0, 31, 31, -1; bra end;
        far: mul.lo.s32 %r0, %r0, 10; bra meet;
        end: add.s32 %o0, %o0, 1;"""
    (found,) = compute(body, x, out=[np.int32])
    assert found.tolist() == [1 + (10 * (31 - i) if i < 16 else 31 - i) for i in range(32)]


def test_lanes_may_exit_early():
    x = np.arange(64, dtype=np.int32)
    body = """setp.lt.s32 %p0, %i0, 10; mov.b32 %o0, 1; st.global.b32 [%d1], %o0; @%p0 exit; mov.b32 %o0, 2;"""
    (found,) = compute(body, x, out=[np.int32])
    assert found.tolist() == [1] * 10 + [2] * 54


def test_blocks_and_threads_have_three_dimensions():
    out = np.zeros((2, 3, 2, 2, 3, 5), np.uint32)
    body = """ld.param.u64 %d0, [p]; mov.u32 %r0, %ctaid.z; mov.u32 %r1, %nctaid.y; mov.u32 %r2, %ctaid.y;
        mad.lo.u32 %r0, %r0, %r1, %r2; mov.u32 %r1, %nctaid.x; mov.u32 %r2, %ctaid.x; mad.lo.u32 %r0, %r0, %r1, %r2;
        mov.u32 %r1, %ntid.z; mov.u32 %r2, %tid.z; mad.lo.u32 %r0, %r0, %r1, %r2; mov.u32 %r1, %ntid.y;
        mov.u32 %r2, %tid.y; mad.lo.u32 %r0, %r0, %r1, %r2; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x;
        mad.lo.u32 %r0, %r0, %r1, %r2; mad.wide.u32 %d1, %r0, 4, %d0; add.u32 %r3, %r0, 1;
        st.global.b32 [%d1], %r3; ret;"""
    memory = Memory()
    memory.add("out", out)
    options = {"parameters": ".param .u64 p", "memory": memory, "grid": (2, 3, 2), "threads": (5, 3, 2)}
    launch(body, [out.ctypes.data], **options)
    assert np.array_equal(out.reshape(-1), np.arange(1, out.size + 1))


def test_many_blocks_run_in_several_batches():
    out = np.zeros(300 * 128, np.uint32)
    memory = Memory()
    memory.add("out", out)
    body = """ld.param.u64 %d0, [p]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x; mad.lo.u32 %r2, %r0, 128, %r1;
        mad.wide.u32 %d1, %r2, 4, %d0; st.global.b32 [%d1], %r2; ret;"""
    options = {"parameters": ".param .u64 p", "memory": memory, "grid": (300, 1, 1), "threads": (128, 1, 1)}
    stats = launch(body, [out.ctypes.data], **options)
    assert np.array_equal(out, np.arange(out.size))
    assert stats.instructions == 300 * 7 and stats.opcodes["mad.wide.u32"] == 300 and stats.opcodes["ret"] == 300


def test_named_barriers():
    """Warps 0 and 1 meet at barrier 1, warps 2 and 3 at barrier 2, and exchange values."""
    a, b = np.zeros(1, np.uint32), np.zeros(128, np.uint32)
    body = """mov.b32 %r9, buffer; mad.lo.u32 %r0, %t0, 4, %r9; st.shared.b32 [%r0], %t0; setp.lt.u32 %p0, %t0, 64;
        @%p0 bar.sync 1, 64; @!%p0 bar.sync 2, 64; xor.b32 %r1, %r0, 128; ld.shared.b32 %r2, [%r1];
        mad.wide.u32 %d2, %t0, 4, %d1; st.global.b32 [%d2], %r2;"""
    on_arrays(body, a, b, declarations=DYNAMIC, shared_bytes=512, threads=(128, 1, 1))
    assert b.tolist() == [i ^ 32 for i in range(128)]


def test_blocks_of_inline_assembly_have_names_of_their_own():
    x = np.arange(32, dtype=np.int32)
    body = """{ .reg .pred p; .reg .b32 t; mul.lo.s32 t, %i0, 2; setp.gt.s32 p, t, 20; @p bra L; mov.b32 t, 0;
        L: mov.b32 %o0, t; }
        { .reg .b32 t; mov.b32 t, 5; bra L; L: add.s32 %o0, %o0, t; }"""
    (found,) = compute(body, x, out=[np.int32])
    assert found.tolist() == [5 + (2 * i if i > 10 else 0) for i in range(32)]


def test_a_module_with_several_kernels_and_debug_sections():
    text = (
        HEADER
        + """
        .file 1 "k.py"
        .global .align 1 .b8 name[3] = {107, 0, 0};
        .visible .entry first() .maxntid 64, 1, 1 { .loc 1 2 3
            .pragma "nounroll"; ret; /* { */ }
        .weak .entry second(.param .f32 x) .reqntid 32 { ret; }
        .section .debug_info { .b32 1 .b8 2 }"""
    )
    kernels = parse(text).kernels
    assert list(kernels) == ["first", "second"] and kernels["second"].parameters == [("x", "f32")]
    assert run(kernels["first"], [], grid=(2, 1, 1), threads=(64, 1, 1), memory=Memory()).instructions == 2
