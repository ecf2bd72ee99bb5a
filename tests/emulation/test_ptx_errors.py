"""The PTX interpreter refuses what it does not model, and every access that a GPU leaves undefined."""

import numpy as np
import pytest

from tests.helpers.ptx_snippets import HEADER, kernel, launch
from tools.gpu_emulation.ptx import Memory, PtxError, parse, run

DYNAMIC = ".extern .shared .align 16 .b8 buffer[];"
POINTER = "ld.param.u64 %d0, [p]; mov.u32 %t0, %tid.x; mov.b32 %r9, buffer; mad.lo.u32 %r0, %t0, 4, %r9;"


def fails(message: str, body: str, array=None, *, shared_bytes=4096, memory=None, **options) -> str:
    """Asserts that `body` fails with `message`, and returns the whole text of the error.

    `body` runs with the address of `array` in %d0, the thread in %t0, and the thread's word of shared memory in %r0.
    """
    array = np.zeros(256, np.uint32) if array is None else array
    if memory is None:
        memory = Memory()
        memory.add("array", array)
    options = {"declarations": DYNAMIC, "parameters": ".param .u64 p", "shared_bytes": shared_bytes} | options
    with pytest.raises(PtxError, match=message) as caught:
        launch(POINTER + body + " ret;", [array.ctypes.data], memory=memory, **options)
    return str(caught.value)


# ---- The text


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.b32 %r0, %r1;",
        "dp4a.u32.u32 %r0, %r1, %r2, %r3;",
        "add.rz.f64 %d0, %d1, %d2;",
        "add.v2.f32 %r0, %r1, %r2;",
        "add.u8 %h0, %h1, %h2;",
        "add.u32 %r0, %r1;",
        "add.u32 %r0, %r1, %r2, %r3;",
        "add.u32 %d0, %r1, %r2;",
        "add.u32 %r0, %h1, %r2;",
        "mov.u32 %r0, %clock;",
        "mov.u32 %r0, unknown;",
        "mul.u32 %r0, %r1, %r2;",
        "ex2.f32 %r0, %r1;",
        "setp.lt.b32 %p0, %r0, %r1;",
        "setp.ltu.s32 %p0, %r0, %r1;",
        "cvt.rz.f16.f32 %h0, %r0;",
        "cvt.rn.e4m3x2.f32 %h0, %r0, %r1;",
        "ld.surface.b32 %r0, [%d0];",
        "ld.global.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%d0];",
        "ld.global.v2.b32 {%r0, %r1, %r2}, [%d0];",
        "ld.global.mmio.b32 %r0, [%d0];",
        "cp.async.bulk.shared.global [%r0], [%d0], 16;",
        "cp.async.cg.shared.global [%r0], [%d0], 8;",
        "mma.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%r0,%r1,%r2,%r3}, {%r0,%r1}, {%r0}, {%r0,%r1,%r2,%r3};",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r0,%r1}, {%r0,%r1,%r2,%r3}, {%r0,%r1}, {%r0,%r1};",
        "wgmma.fence.sync.aligned;",
        "mbarrier.init.shared.b64 [%r0], 1;",
        "atom.global.add.relu.f32 %r0, [%d0], %r1;",
        "shfl.bfly.b32 %r0, %r1, 1, 31;",
        "vote.ballot.b32 %r0, %p0;",
        "bar.red.popc.u32 %r0, 0, %p0;",
        "bar.arrive 0, 64;",
        "call.uni (%r0), function, (%r1);",
        "bra nowhere;",
        "@%r0 mov.b32 %r1, %r2;",
        ".reg .b128 %q0;",
        ".branchtargets a, b;",
    ],
)
def test_unsupported_text(body):
    """The error comes at parse time and shows the text of the instruction."""
    text = body.rstrip(";")
    with pytest.raises(PtxError) as caught:
        kernel(body + " ret;")
    assert text in str(caught.value)


def test_text_without_a_kernel():
    with pytest.raises(PtxError, match=r"no \.entry"):
        parse(HEADER)


def test_launch_arguments():
    k = kernel("ret;", ".param .u32 n, .param .f32 x")
    options = {"grid": (1, 1, 1), "threads": (32, 1, 1), "memory": Memory()}
    with pytest.raises(PtxError, match="takes 2 arguments .n: u32, x: f32., got 1"):
        run(k, [1], **options)
    with pytest.raises(PtxError, match=r"parameter n of kernel k is \.u32, got 0\.5"):
        run(k, [0.5, 0.5], **options)
    with pytest.raises(ValueError, match="threads: expected three positive numbers"):
        run(k, [1, 1.0], **options | {"threads": (32, 0, 1)})
    with pytest.raises(PtxError, match="requires 64 threads, launched with 32"):
        run(kernel("ret;", hints=".reqntid 64"), [], **options)
    with pytest.raises(PtxError, match="allows 16 threads, launched with 32"):
        run(kernel("ret;", hints=".maxntid 16, 1, 1"), [], **options)


def test_buffers():
    memory, array = Memory(), np.zeros((4, 4), np.float32)
    assert memory.add("x", array) == array.ctypes.data
    with pytest.raises(ValueError, match="'y' overlaps buffer 'x'"):
        memory.add("y", array[2:])
    with pytest.raises(ValueError, match="C-contiguous"):
        memory.add("z", array.T[1:])
    with pytest.raises(ValueError, match=r"defined has shape \(3,\)"):
        memory.add("w", np.zeros(4), defined=np.ones(3, bool))
    frozen = np.zeros(4)
    frozen.setflags(write=False)
    with pytest.raises(ValueError, match="pass writable=False"):
        memory.add("v", frozen)


# ---- Global memory


def test_out_of_bounds():
    text = fails(
        "4 bytes at 0x[0-9a-f]+, 4 bytes past the end of buffer 'array' .1024 bytes.",
        "add.s64 %d1, %d0, 1024; setp.eq.u32 %p0, %t0, 5; @%p0 ld.global.b32 %r1, [%d1]; mov.b32 %r2, 0;",
    )
    assert "kernel k, block (0, 0, 0), thread (5, 0, 0)" in text and "@%p0 ld.global.b32 %r1, [%d1]" in text
    fails("2 bytes before the start of buffer 'array'", "st.global.b16 [%d0+-2], 7;")
    # The first half of the vector lies inside.
    fails("8 bytes past the end", "ld.global.v4.b32 {%r1,%r2,%r3,%r4}, [%d0+16];", np.zeros(6, np.uint32))
    fails("no buffer is registered", "ld.global.b32 %r1, [%d0];", memory=Memory())


def test_misaligned_vectors():
    fails("misaligned access of 16 bytes", "ld.global.v4.b32 {%r1,%r2,%r3,%r4}, [%d0+8];")
    fails("misaligned access of 8 bytes", "st.global.v4.b16 [%d0+4], {1,2,3,4};")
    fails("misaligned shared access of 16 bytes at 8", "st.shared.v4.b32 [buffer+8], {1,2,3,4};")
    fails("misaligned access of 16 bytes", "cp.async.cg.shared.global [buffer], [%d0+4], 16;")
    fails("misaligned shared access of 16 bytes", "cp.async.cg.shared.global [buffer+4], [%d0], 16;")


def test_read_only_and_undefined_buffers():
    array = np.zeros(32, np.uint32)
    memory = Memory()
    memory.add("weights", array, writable=False)
    fails("write to the read-only buffer 'weights'", "st.global.b32 [%d0], 1;", array, memory=memory)
    memory = Memory()
    memory.add("result", array, defined=False)
    read = "mad.wide.u32 %d1, %t0, 4, %d0; ld.global.b32 %r1, [%d1];"
    fails("'result' that was never written, at offset 0", read, array, memory=memory)
    memory = Memory()
    memory.add("result", array, defined=np.arange(32) != 9)
    text = fails("never written, at offset 36", read, array, memory=memory)
    assert "thread (9, 0, 0)" in text
    memory = Memory()
    memory.add("result", array, defined=False)
    write = "mad.wide.u32 %d1, %t0, 4, %d0; st.global.b32 [%d1], %t0; ld.global.b32 %r1, [%d1]; ret;"
    options = {"declarations": DYNAMIC, "parameters": ".param .u64 p", "memory": memory}
    launch(POINTER + write, [array.ctypes.data], **options)
    assert array.tolist() == list(range(32))


# ---- Shared and local memory, registers


def test_shared_bounds_and_initialisation():
    fails("shared access out of bounds: 4 bytes at 128 of 128", "st.shared.b32 [%r0+4], 0;", shared_bytes=128)
    fails("shared access out of bounds: 4 bytes at -4 of 128", "ld.shared.b32 %r1, [buffer+-4];", shared_bytes=128)
    text = fails(
        "uninitialised shared memory at 52",
        "setp.ne.u32 %p0, %t0, 13; @%p0 st.shared.b32 [%r0], 0; ld.shared.b32 %r1, [%r0];",
    )
    assert "thread (13, 0, 0)" in text
    fails("uninitialised local memory", ".local .align 4 .b8 own[8]; st.local.b32 [own], 1; ld.local.b32 %r1, [own+4];")
    fails("local access of 4 bytes at 8 of 8", ".local .align 4 .b8 own[8]; st.local.b32 [own+8], 1;")


def test_uninitialised_registers():
    text = fails("uninitialised register %r5", "add.u32 %r1, %r5, 1;")
    assert "thread (0, 0, 0)" in text
    text = fails("uninitialised register %r5", "setp.gt.u32 %p0, %t0, 3; @!%p0 mov.b32 %r5, 1; add.u32 %r1, %r5, 1;")
    assert "thread (4, 0, 0)" in text
    branch = "setp.gt.u32 %p0, %t0, 7; @%p0 bra skip; mov.b32 %r5, 1; skip: st.global.b32 [%d0], %r5;"
    assert "thread (8, 0, 0)" in fails("uninitialised register %r5", branch)
    fails("uninitialised register %p3", "@%p3 bra over; over: mov.b32 %r1, 0;")
    fails("uninitialised register %p3", "@%p3 mov.b32 %r1, 0;")


def test_registers_that_every_thread_writes_are_fine():
    body = "setp.gt.u32 %p0, %t0, 3; @%p0 mov.b32 %r5, 1; @!%p0 mov.b32 %r5, 2; add.u32 %r1, %r5, 1; ret;"
    launch(POINTER + body, [0], declarations=DYNAMIC, parameters=".param .u64 p")


COPY = "mad.wide.u32 %d1, %t0, 16, %d0; mad.lo.u32 %r0, %t0, 16, %r9; cp.async.cg.shared.global [%r0], [%d1], 16; "


def test_copies_in_flight():
    fails("read of shared memory at 0 while a cp.async", COPY + "cp.async.commit_group; ld.shared.b32 %r1, [%r0];")
    fails("write to shared memory at 0 while a cp.async", COPY + "cp.async.commit_group; st.shared.b32 [%r0], 0;")
    fails("write to shared memory at 0 while a cp.async", COPY + COPY)
    # The copy is not committed, so that the wait does not include it.
    fails("while a cp.async", COPY + "cp.async.wait_group 0; ld.shared.b32 %r1, [%r0];")
    fails("while a cp.async", COPY + "cp.async.commit_group; cp.async.wait_group 1; ld.shared.b32 %r1, [%r0];")
    # The other warp does not wait, and each warp waits only for its own copies.
    both = COPY + "setp.lt.u32 %p0, %t0, 32; @%p0 cp.async.wait_all; bar.sync 0; ld.shared.b32 %r1, [%r0];"
    assert "thread (32, 0, 0)" in fails("while a cp.async", both, threads=(64, 1, 1))


# ---- Races between warps

NEIGHBOUR = "xor.b32 %r1, %r0, 128; "


@pytest.mark.parametrize(
    "access, body",
    [
        ("read by warp 0, written by warp 1", "st.shared.b32 [%r0], %t0; {0} ld.shared.b32 %r2, [%r1];"),
        ("write by warp 0, written by warp 1", "st.shared.b32 [%r0], %t0; {0} st.shared.b32 [%r1], %t0;"),
        (
            "write by warp 1, read by warp 0",
            "st.shared.b32 [%r0], %t0; bar.sync 0; ld.shared.b32 %r2, [%r1]; {0} mov.b32 %r3, 9; "
            "st.shared.b32 [%r0], %r3;",
        ),
        (
            "read by warp 1, written by warp 0",
            "setp.lt.u32 %p0, %t0, 32; @%p0 cp.async.ca.shared.global [%r0], [%d0], 4; cp.async.wait_all; {0} "
            "@!%p0 ld.shared.b32 %r2, [%r1];",
        ),
        (
            "read by warp 1, written atomically",
            "setp.lt.u32 %p0, %t0, 32; st.shared.b32 [%r0], 0; bar.sync 0; @%p0 red.shared.add.u32 [buffer], 1; {0} "
            "@!%p0 ld.shared.b32 %r2, [buffer];",
        ),
    ],
)  # fmt: skip
def test_races_without_a_barrier(access, body):
    fails(f"race in shared memory at [0-9]+: {access}", NEIGHBOUR + body.format(""), threads=(64, 1, 1))
    array, memory = np.zeros(256, np.uint32), Memory()
    memory.add("array", array)
    options = {"declarations": DYNAMIC, "parameters": ".param .u64 p", "memory": memory, "shared_bytes": 256}
    text = POINTER + NEIGHBOUR + body.format("bar.sync 0;") + " ret;"
    launch(text, [array.ctypes.data], threads=(64, 1, 1), **options)


def test_every_reader_counts_for_a_race():
    """Warp 0 reads after warp 1. Then warp 0 writes, which still races with the read of warp 1."""
    body = """st.shared.b32 [%r0], %t0; bar.sync 0; setp.lt.u32 %p0, %t0, 32; @!%p0 ld.shared.b32 %r2, [buffer];
        @%p0 ld.shared.b32 %r2, [buffer]; setp.eq.u32 %p1, %t0, 0; @%p1 st.shared.b32 [buffer], 5;"""
    fails("write by warp 0, read by warp 1", body, threads=(64, 1, 1))


def test_stores_of_the_same_value_do_not_race():
    array, memory = np.zeros(256, np.uint32), Memory()
    memory.add("array", array)
    body = "and.b32 %r1, %t0, 1; st.shared.b32 [buffer], 7; bar.sync 0; ld.shared.b32 %r2, [buffer]; ret;"
    options = {"declarations": DYNAMIC, "parameters": ".param .u64 p", "memory": memory, "shared_bytes": 256}
    launch(POINTER + body, [array.ctypes.data], threads=(128, 1, 1), **options)
    turns = "setp.lt.u32 %p0, %t0, 32; @%p0 st.shared.b32 [buffer], {}; @!%p0 st.shared.b32 [buffer], {}; "
    launch(POINTER + turns.format(7, 7) + "ret;", [array.ctypes.data], threads=(64, 1, 1), **options)
    fails("write by warp 1, written by warp 0", turns.format(7, 8), threads=(64, 1, 1))
    fails("two lanes of one instruction store different values", "st.shared.b32 [buffer], %t0;")


# ---- Warps and barriers

LOWER = "setp.lt.u32 %p0, %t0, 16; "
ZEROS = "".join(f"mov.b32 %r{i}, 0; " for i in range(1, 9))


@pytest.mark.parametrize(
    "message, text",
    [
        ("mma.sync by a partial warp: 16 of its lanes", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
         "{%r1,%r2,%r3,%r4}, {%r1,%r2,%r3,%r4}, {%r5,%r6}, {%r1,%r2,%r3,%r4};"),
        ("ldmatrix by a partial warp: 16 of its lanes", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [buffer];"),
        ("shfl.sync: its mask names lanes 0xffffffff, the active lanes are 0x0000ffff",
         "shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;"),
        ("vote.sync: its mask names lanes 0xffffffff", "vote.sync.any.pred %p1, %p0, -1;"),
        ("redux.sync: its mask names lanes 0x000000ff", "redux.sync.add.u32 %r1, %r2, 0xff;"),
        ("bar.warp.sync: its mask names lanes 0xffffffff", "bar.warp.sync 0xffffffff;"),
        ("bar.sync by a partial warp: lane 16 is elsewhere", "bar.sync 0;"),
    ],
)  # fmt: skip
def test_partial_warps(message, text):
    fails(message, ZEROS + LOWER + f"@%p0 {text}")
    fails(message, ZEROS + LOWER + f"@!%p0 bra over; {text} over: bar.warp.sync -1;")


def test_shuffle_from_a_lane_that_takes_no_part():
    fails("shfl.sync reads lane 16", LOWER + "@%p0 shfl.sync.down.b32 %r1, %t0, 1, 31, 0xffff;")


def test_barriers_that_other_threads_do_not_reach():
    exit_first = "setp.ge.u32 %p0, %t0, 32; @%p0 exit; bar.sync 0;"
    fails(
        "barrier 0 waits for 64 threads for ever: 32 threads of the block have exited", exit_first, threads=(64, 1, 1)
    )
    split = "setp.ge.u32 %p0, %t0, 32; @%p0 bar.sync 1; @!%p0 bar.sync 2;"
    fails("the other threads of the block wait at other barriers", split, threads=(64, 1, 1))
    fails("lane 0 has exited", "setp.lt.u32 %p0, %t0, 16; @%p0 exit; bar.sync 0;")


def test_control_flow():
    fails("bra.uni goes both ways within a warp", LOWER + "@%p0 bra.uni over; over: mov.b32 %r1, 0;")
    fails("more than 1000 instructions: an endless loop", "again: bra again;", limit=1000)
    fails("trap", LOWER + "@%p0 trap;")
    with pytest.raises(PtxError, match="past its last instruction"):
        launch("mov.b32 %r0, 0;")


def test_errors_name_the_block_in_a_batch():
    body = "mov.u32 %r1, %ctaid.y; setp.eq.u32 %p0, %r1, 2; @%p0 ld.global.b32 %r2, [%d0+-64];"
    text = fails("out of bounds", body, grid=(2, 4, 3), threads=(40, 1, 1))
    assert "block (0, 2, 0), thread (0, 0, 0)" in text
