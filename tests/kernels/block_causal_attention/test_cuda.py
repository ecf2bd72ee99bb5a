"""The CUDA kernels of block_causal_attention: emulated, compiled, with planted faults (on a CPU)."""

import functools

import pytest
import torch

from tests.kernels.block_causal_attention.contract import check as check_values_and_gradients
from tests.kernels.block_causal_attention.contract import references, with_grads
from tests.kernels.block_causal_attention.emulated import (
    DTYPES,
    HALVES,
    KERNELS,
    SHORT,
    SOURCE,
    TENSOR_CORE_DIMS,
    emulated,
    emulation,
    needs_nvcc,
)
from tools.gpu_emulation.cuda import build
from tools.gpu_emulation.cuda.mutants import Mutant, assert_found, assert_nothing_found, parameters
from tools.report import machine_code
from var_kernels import block_causal_attention
from var_kernels.testing import assert_accurate, attention_inputs, randn, scale_lens, stated_order

if build.unavailable_reason() is not None:
    pytest.skip(build.unavailable_reason(), allow_module_level=True)


# The kernels with tensor cores take 64 rows by 64 keys, the plain kernel 32 by 32. The lengths are on both sides of
# these; at the end of a row of tiles none is a multiple of 8. Tiles contain one scale, several, or parts of two.
SCHEDULES = {
    "one token": (1,),
    "shorter than a tile": (1, 4, 9, 16),
    "small scales fill tiles": (23, 23, 23, 1, 1, 24, 7),
    "a tile and one row": (64, 65, 1),
    "a large scale first": (129, 2, 63, 33),
    "plain causal": (1,) * 131,
    "one scale": (193,),
}
PLAIN_DIMS = (1, 20, 126, 200, 256)


def check(inputs, lens, variant="fast", *, seed=0, late_copies=True, executor=None, rows_cancel=False, **options):
    """out, lse and gradients are as accurate as plain PyTorch in the same dtype, and ldmatrix has no bank conflicts."""
    with emulation(variant, seed=seed, late_copies=late_copies, executor=executor) as record:
        check_values_and_gradients(inputs, lens, backend="cuda", rows_cancel=rows_cancel, **options)
        lse = block_causal_attention(*inputs, lens, backend="cuda", return_lse=True, **options)[1]
    same, exact = references([x.float() for x in inputs], lens, **options)
    assert_accurate(lse, same[1], exact[1], name="lse")
    assert record.counters["bank_conflicts"] == 0
    return record.counters


# ---- accuracy, races, bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_schedules(dtype, variant):
    for index, lens in enumerate(SCHEDULES.values()):
        inputs = attention_inputs(1, 2, sum(lens), 64, seed=index, dtype=dtype)
        counters = check(inputs, lens, variant, seed=(0, 1, 7)[index % 3], late_copies=index % 2 == 0,
                         rows_cancel=len(lens) == 1)  # fmt: skip
        assert (counters["mma"] > 0) == (dtype in HALVES)


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_head_dims_of_tensor_cores(dtype, variant):
    for index, dim in enumerate(TENSOR_CORE_DIMS):
        counters = check(attention_inputs(2, 1, 91, dim, seed=dim, dtype=dtype), SHORT, variant, seed=index,
                         late_copies=index % 2 == 1)  # fmt: skip
        assert counters["mma"] > 0


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims_of_the_plain_kernel(dtype, variant):
    for index, dim in enumerate(PLAIN_DIMS):
        counters = check(attention_inputs(1, 2, 55, dim, seed=dim, dtype=dtype), SHORT[:5], variant, seed=index)
        assert counters["mma"] == 0


@pytest.mark.parametrize("late_copies", [True, False])
def test_every_order_gives_the_same_bits(late_copies):
    lens = scale_lens("256px")[:8]
    inputs = attention_inputs(1, 1, sum(lens), 64, seed=3, dtype=torch.bfloat16)
    results = []
    for seed in (0, 1, 2, 9):
        with emulation(seed=seed, late_copies=late_copies):
            attention = functools.partial(block_causal_attention, scale_lens=lens, backend="cuda")
            results.append(with_grads(attention, inputs, inputs[0]))
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


# Ranges at the end (a step against a cache), in the middle and at the start. Some begin or end inside a scale.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "q_offset"), [(1, None), (36, None), (65, None), (1, 0), (30, 7), (3, 29)])
def test_query_ranges(queries, q_offset, dtype):
    inputs = attention_inputs(2, 4, 91, 40, seed=2, dtype=dtype, kv_heads=2, query_length=queries)
    check(inputs, SHORT, "race", q_offset=q_offset, rows_cancel=queries < 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax_scales_and_large_logits(dtype):
    inputs = attention_inputs(1, 2, 55, 32, seed=5, dtype=dtype)
    for softmax_scale in (1.0, -0.05):
        check(inputs, SHORT[:5], softmax_scale=softmax_scale)
    check(attention_inputs(1, 2, 55, 32, seed=6, dtype=dtype, logit_std=30.0), SHORT[:5], rows_cancel=True)
    with emulation():  # the result depends on the number of keys only
        zero = block_causal_attention(*inputs, SHORT[:5], softmax_scale=0.0, backend="cuda")
    exact = block_causal_attention(*inputs, SHORT[:5], softmax_scale=0.0, backend="reference")
    torch.testing.assert_close(zero, exact)


def test_many_heads_in_sections():
    # A section is 16 MB of keys and values, which are 13 of the 14 heads here. A tile goes over many blocks of keys.
    inputs = attention_inputs(1, 14, 5000, 64, seed=7, dtype=torch.bfloat16, query_length=3)
    check(inputs, (2500, 2497, 3), rows_cancel=True)


def test_schedules_too_long_for_arguments():
    lens = tuple(1 + i % 2 for i in range(1001))  # as many runs of equal lengths
    inputs = attention_inputs(1, 1, sum(lens), 8, seed=8, dtype=torch.float16)
    counters = check(inputs, lens, "race")
    assert counters["launches"] > 5  # two forwards and one backward, of two kernels


def test_sanitizers_find_nothing():
    KERNELS.assert_sanitizers_find_nothing("""
        from tests.kernels.block_causal_attention import test_cuda as tests
        for dim, dtype in ((64, torch.bfloat16), (72, torch.float16), (126, torch.bfloat16), (40, torch.float32)):
            tests.check(tests.attention_inputs(1, 2, 91, dim, seed=1, dtype=dtype), tests.SHORT, "sanitized")
    """)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_lse(dtype):
    inputs = attention_inputs(2, 4, 55, 40, seed=8, kv_heads=2, query_length=50)
    inputs = [x.to(dtype).float() for x in inputs]
    dlse = randn(2, 4, 50, seed=10)

    def run(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        lse = block_causal_attention(*leaves, SHORT[:5], backend=backend, return_lse=True)[1]
        return torch.autograd.grad(lse, leaves, dlse.to(lse.dtype), materialize_grads=True, allow_unused=True)

    with emulation("race"):
        actual = run("cuda", dtype)
    with stated_order():
        same, exact = run("reference", dtype), run("reference", torch.float64)
    for name, *results in zip(("dq", "dk"), actual, same, exact, strict=False):
        assert_accurate(*results, name=name)
    assert not actual[2].any()


# ---- layouts, emptiness, non-finite values -------------------------------------------------------------------------


def test_views_of_packed_qkv():
    packed = randn(2, 91, 3, 2, 24, seed=18, dtype=torch.bfloat16)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    with emulation("race") as record:
        out = block_causal_attention(q, k, v, SHORT, backend="cuda")
        dense = block_causal_attention(*(x.contiguous() for x in (q, k, v)), SHORT, backend="cuda")
    assert record.counters["mma"] > 0
    assert out.transpose(1, 2).is_contiguous() and torch.equal(out, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype):
    layouts = (
        lambda x: x.mT.contiguous().mT,  # copied: the last dimension is not dense
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5],  # rows at odd addresses
        lambda x: torch.nn.functional.pad(x, (8, 8))[..., 8:-8],
    )
    inputs = attention_inputs(2, 2, 55, 24, seed=20, dtype=dtype)
    for first in range(4):
        check([layouts[(first + i) % 4](x) for i, x in enumerate(inputs)], SHORT[:5], "race")


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_empty(batch, queries):
    q, k, v = (x.requires_grad_() for x in attention_inputs(batch, 2, 5, 8, seed=22, query_length=queries))
    with emulation() as record:
        out, lse = block_causal_attention(q, k, v, (1, 4), return_lse=True, backend="cuda")
        (out.sum() + lse.sum()).backward()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in (q, k, v))
    assert out.shape == q.shape and lse.shape == q.shape[:3] and record.counters["launches"] == 0


@pytest.mark.parametrize("dim", [24, 25])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_reach_the_rows_that_see_them(bad, dim):
    # Scales are whole tiles here, because a scale that shares a tile with a later one gets 0 * NaN.
    lens = (64, 64, 10)
    q, k, v = attention_inputs(1, 1, 138, dim, seed=23, dtype=torch.float16)
    with emulation():
        clean = block_causal_attention(q, k, v, lens, backend="cuda")
        for tensor in (k, v):
            spoiled = tensor.clone()
            spoiled[0, 0, 70] = bad
            out = block_causal_attention(q, *(spoiled if x is tensor else x for x in (k, v)), lens, backend="cuda")
            assert torch.equal(out[:, :, :64], clean[:, :, :64])
            if tensor is v or bad is torch.nan:
                assert not out[:, :, 64:].isfinite().any()


def test_raw_op_checks_its_arguments():
    op = emulated("fast").ops._block_causal_attention
    q, k, v = attention_inputs(1, 2, 14, 8, seed=24)
    for message, arguments in {
        r"v: expected shape \(1, 2, 14, 8\), got shape \(1, 2, 13, 8\)": (q, k, v[:, :, 1:], [14], 1.0, 0),
        "k: expected Float, got Half": (q, k.half(), v, [14], 1.0, 0),
        "scale_lens: expected lengths > 0, got -1": (q, k, v, [15, -1], 1.0, 0),
        "scale_lens: expected lengths that sum to 14, got 13": (q, k, v, [13], 1.0, 0),
        "q_offset: expected 0 to 0, got 1": (q, k, v, [14], 1.0, 1),
        "q: expected a dense last dimension, got stride 14": (q.mT.contiguous().mT, k, v, [14], 1.0, 0),
        "q: expected float32, bfloat16 or float16, got Double": (*(x.double() for x in (q, k, v)), [14], 1.0, 0),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_opcheck():
    q, k, v = randn(2, 14, 3, 2, 8, seed=23, dtype=torch.float16).permute(2, 0, 3, 1, 4).unbind()
    with emulation():
        ops, options = emulated("fast").ops, ([1, 4, 9], 0.5, 0)
        torch.library.opcheck(ops._block_causal_attention.default, (q, k, v, *options))
        out, lse = ops._block_causal_attention(q, k, v, *options)
        arguments = (torch.ones_like(out), q, k, v, out, lse, torch.ones_like(lse), *options)
        torch.library.opcheck(ops._block_causal_attention_backward.default, arguments)


# ---- the code that nvcc compiles -----------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.parametrize(
    ("dim", "dtype", "lens", "heads", "queries"),
    [
        (64, torch.bfloat16, (1, 4, 9, 16, 36, 13), 1, 79),
        (40, torch.float16, (1, 4, 9), 2, 10),
        (72, torch.bfloat16, (1, 4, 9, 60), 1, 60),
        (128, torch.float16, (5, 67), 1, 67),
        (20, torch.float32, (1, 4, 9, 21), 1, 30),
        (126, torch.bfloat16, (1, 4, 9), 1, 14),
    ],
)
def test_ptx_is_accurate(dim, dtype, lens, heads, queries):
    """Executes the code that nvcc compiles for sm_80 in the PTX interpreter, called from the same entry function."""
    from tools.gpu_emulation.cuda.ptx import execute_ptx_of

    packed = randn(1, sum(lens), heads + 2, dim, seed=15, dtype=dtype).transpose(1, 2)
    inputs = packed[:, :heads, -queries:], packed[:, -2:-1], packed[:, -1:]
    check(inputs, lens, executor=execute_ptx_of(SOURCE))


# Registers of a thread: three blocks of 128 threads fit on a multiprocessor with 64 columns, two with more.
REGISTERS = {
    "attention_forward_kernel<bf16, 64>": 168,
    "attention_forward_kernel<fp16, 64>": 168,
    "attention_part_kernel<bf16, 64>": 168,
    "attention_part_kernel<fp16, 64>": 168,
    "attention_combine_kernel": 64,
    "tf32_attention_forward_kernel<64>": 168,
    "tf32_attention_": 255,
    "attention_": 255,
    "plain_attention_": 255,
    "write_schedule_kernel": 40,
}
# For compute capability 8.x, up to 4 registers are spilled: 64 KB of fp32 sums in 128 threads leave too few.
STACK = {"plain_attention_backward_keys_kernel<float, 256>": 16}


@pytest.mark.evidence
@pytest.mark.parametrize("arch", machine_code.ARCHS)
def test_machine_code(arch, selected):
    kernels = machine_code.kernels(SOURCE, arch, selected("arch"))
    assert len(kernels) == 6 * 4 + 2 + 2 + 9 * 3 + 1
    for kernel in kernels:
        machine_code.assert_resources(kernel, REGISTERS, STACK.get(kernel.name, 0))
        if kernel.name.startswith("attention_combine"):
            # Only the numbers of a schedule, and m and l of the parts, are loaded in other widths.
            assert len(kernel.having("LDG")) > len(kernel.narrow("LDG")), kernel.name
            assert len(kernel.narrow("STG")) <= 1, f"{kernel.name}: {kernel.having('STG')}"
        elif kernel.name.startswith(("attention_", "tf32_")):
            assert kernel.having("LDGSTS") and not kernel.narrow("LDGSTS"), kernel.name
            narrow = 0 if "keys" in kernel.name else 2  # lse, delta, or m and l, of two rows
            assert len(kernel.narrow("STG")) <= narrow, f"{kernel.name}: {kernel.having('STG')}"
            product = "HMMA.1688.F32.TF32" if kernel.name.startswith("tf32_") else "HMMA.16816.F32"
            assert any(opcode.startswith(product) for opcode in kernel.opcodes), kernel.name


# ---- planted faults ------------------------------------------------------------------------------------------------

FORWARD, BACKWARD, DEVICE = (
    "block_causal_attention.cuh", "block_causal_attention_backward.cuh", "block_causal_attention_device.cuh",
)  # fmt: skip
FAULTS = {
    "waits for too little": Mutant(
        FORWARD, "cp_async_wait<1>();  // the keys", "cp_async_wait<2>();  // the keys", "in_flight"),
    "no barrier before the scores": Mutant(
        FORWARD, "__syncthreads();          // and every warp", "// and every warp", "race"),
    "no barrier before the values": Mutant(
        FORWARD, "__syncthreads();\n  stages.start_values(block + 1)", "stages.start_values(block + 1)", "race",
        representative=True),
    "no warp barrier in the results": Mutant(DEVICE, "  __syncwarp();\n", "", "race"),
    "keys past the end": Mutant(DEVICE, "first + row + r < limit && (c", "(c", "out_of_bounds"),
    "columns past the end": Mutant(DEVICE, " && (c + chunk) * kWidth < dim", "", "out_of_bounds"),
    "no swizzle": Mutant(DEVICE, "chunk ^ (row & 7) : ", "chunk : ", "conflicts"),
    "copied without the swizzle": Mutant(
        DEVICE, "target = tile + swizzled<T, kDim>(row, chunk)", "target = tile + row * kDim + chunk * kWidth",
        "values"),
    "sees one key too many": Mutant(FORWARD, "% 2 >= visible", "% 2 > visible", "values"),
    "what was summed is not rescaled": Mutant(
        FORWARD, "rows.acc[n][2 * half] *= factor", "rows.acc[n][2 * half] *= 1.0f", "values"),
    "backward waits for too little": Mutant(
        BACKWARD, "cp_async_wait<1>();\n  stages.store_statistic",
        "cp_async_wait<2>();\n  stages.store_statistic", "in_flight"),
    "no barrier after the statistics": Mutant(
        BACKWARD, "step, statistic, masked);\n  __syncthreads();", "step, statistic, masked);", "race"),
    "values overtake out": Mutant(BACKWARD, "__syncthreads();  // the warps are done with out", "", "race"),
    "a key is seen too early": Mutant(
        BACKWARD, "8 >= stages.statistics.visible", "8 > stages.statistics.visible", "values", representative=True),
    "a warp diverges": Mutant(
        FORWARD, "    total += __shfl_xor_sync(kFullWarp, total, 2);",
        "    if (threadIdx.x % 8 < 4) total += __shfl_xor_sync(kFullWarp, total, 2);", "divergence"),
}  # fmt: skip


def steps(faulty, looked_for, dim=64):
    inputs = attention_inputs(1, 1, 135, dim, seed=1, dtype=torch.bfloat16)
    dout, lens = randn(1, 1, 135, dim, seed=4, dtype=torch.bfloat16), (65, 1, 69)
    attention = functools.partial(block_causal_attention, scale_lens=lens)

    @functools.cache
    def run():
        with emulation(faulty, seed=1) as record:
            return with_grads(functools.partial(attention, backend="cuda"), inputs, dout), record.counters

    def accurate():
        with stated_order():
            same, exact = (
                with_grads(functools.partial(attention, backend="reference"), inputs, dout, dtype)
                for dtype in (torch.bfloat16, torch.float64)
            )
        for results in zip(run()[0], same, exact, strict=True):
            assert_accurate(*results)

    yield lambda: {"conflicts"} if run()[1]["bank_conflicts"] else set()
    yield accurate


@pytest.mark.parametrize("name", parameters(FAULTS, others=pytest.mark.evidence))
def test_planted_faults_are_found(name, selected):
    looking = functools.partial(steps, dim=40 if name == "columns past the end" else 64)
    assert_found(SOURCE, FAULTS, name, looking, selected("name"), ("bf16",))


@pytest.mark.evidence
def test_nothing_is_found_without_a_fault():
    for dim in (40, 64):
        assert_nothing_found(SOURCE, FAULTS, functools.partial(steps, dim=dim))
