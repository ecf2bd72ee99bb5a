"""The CUDA kernels of float32 attention on tensor cores, where TF32 is allowed. The tests are as in test_cuda.py."""

import functools

import pytest
import torch

from tests.kernels.block_causal_attention.contract import references, with_grads
from tests.kernels.block_causal_attention.emulated import KERNELS, SHORT, SOURCE, emulated, emulation, needs_nvcc
from tools.gpu_emulation.cuda.mutants import Mutant, assert_found, assert_nothing_found, parameters
from var_kernels import block_causal_attention
from var_kernels.testing import assert_accurate, attention_inputs, max_error, randn

# A tile is 64 rows by 32 keys. There are one or several tiles, some with rows of several scales, some with masks.
SCHEDULES = {
    "one token": (1,),
    "shorter than a tile": (1, 4, 9, 16),
    "small scales fill tiles": (23, 23, 1, 24, 7),
    "a tile and one row": (64, 65),
    "plain causal": (1,) * 67,
}
DIMS = (4, 12, 64, 68, 100, 128)  # kernels have 64 or 128 columns, full or padded
NARROW = 0xFFFFE000 - (1 << 32)  # the bits of a float32 that TF32 keeps


@pytest.fixture(autouse=True)
def setting():
    """PyTorch's setting, which allows TF32 in the test and is restored after it."""
    matmul = torch.backends.cuda.matmul
    previous = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield matmul
    matmul.fp32_precision = previous


def forward(inputs, lens, variant="fast", **options):
    """(out, lse) of tensor cores, which are as accurate as plain PyTorch in float32."""
    with emulation(variant, **options) as record:
        results = block_causal_attention(*inputs, lens, backend="cuda", return_lse=True)
    assert record.counters["mma"] > 0 or "executor" in options
    assert record.counters["bank_conflicts"] == 0
    for name, *each in zip(("out", "lse"), results, *references(inputs, lens), strict=True):
        assert_accurate(*each, name=name)
    return results


@pytest.mark.parametrize("variant", ["fast", "race"])
def test_schedules(variant):
    for index, lens in enumerate(SCHEDULES.values()):
        inputs = attention_inputs(1, 2, sum(lens), 64, seed=index, kv_heads=1 + index % 2)
        forward(inputs, lens, variant, seed=(0, 1, 7)[index % 3], late_copies=index % 2 == 0)


def test_gradients(setting):
    """Backward has no tensor cores. It gets an lse of scores that were rounded otherwise: at most twice the error."""
    for index, lens in enumerate(SCHEDULES.values()):
        inputs = attention_inputs(1, 2, sum(lens), 64, seed=index, kv_heads=1 + index % 2)
        dout, results = randn(*inputs[0].shape, seed=99), {}
        for precision in ("ieee", "tf32"):
            setting.fp32_precision = precision
            attention = functools.partial(block_causal_attention, scale_lens=lens, backend="cuda")
            with emulation():
                results[precision] = with_grads(attention, inputs, dout)
        attention = functools.partial(block_causal_attention, scale_lens=lens, backend="reference")
        results["exact"] = with_grads(attention, inputs, dout, torch.float64)
        for plain, split, exact in zip(*results.values(), strict=True):
            rounding = torch.finfo(torch.float32).eps * exact.abs().max()
            assert max_error(split, exact) <= 2 * (max_error(plain, exact) + rounding)


@pytest.mark.parametrize("variant", ["fast", "race"])
def test_head_dims(variant):
    for index, dim in enumerate(DIMS):
        forward(attention_inputs(2, 1, 91, dim, seed=dim), SHORT, variant, seed=index, late_copies=index % 2 == 1)


def test_query_ranges_and_views():
    packed = randn(2, 91, 3, 2, 20, seed=18)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    for queries in (1, 36, 65):
        forward((q[:, :, -queries:], k, v), SHORT, "race")


def test_softmax_scales_and_large_logits():
    inputs = attention_inputs(1, 2, 55, 32, seed=5)
    for softmax_scale in (1.0, -0.05, 0.0):
        with emulation():
            out = block_causal_attention(*inputs, SHORT[:5], softmax_scale=softmax_scale, backend="cuda")
        same, exact = references(inputs, SHORT[:5], softmax_scale=softmax_scale)
        assert_accurate(out, same[0], exact[0])
    forward(attention_inputs(1, 2, 55, 32, seed=6, logit_std=30.0), SHORT[:5])


def test_error_is_far_below_that_of_tf32():
    inputs = attention_inputs(1, 2, 91, 64, seed=3)
    exact = references(inputs, SHORT)[1]
    rounded = [((x.view(torch.int32) + 0x1000) & NARROW).view(torch.float32) for x in inputs]
    single = references(rounded, SHORT)[1]
    for actual, once, right in zip(forward(inputs, SHORT), single, exact, strict=True):
        assert max_error(actual, right) < max_error(once, right) / 100


def test_only_where_allowed_and_addressable(setting):
    unaligned = [torch.nn.functional.pad(x, (3, 5))[..., 3:-5] for x in attention_inputs(1, 1, 14, 8, seed=1)]
    cases = {
        "ieee": attention_inputs(1, 1, 14, 8, seed=1),
        "tf32": unaligned,
        "tf32 ": attention_inputs(1, 1, 14, 6, seed=1),
        "tf32  ": attention_inputs(1, 1, 14, 132, seed=1),
    }
    for precision, inputs in cases.items():
        setting.fp32_precision = precision.strip()
        with emulation() as record:
            block_causal_attention(*inputs, (1, 4, 9), backend="cuda")
        assert record.counters["launches"] == 1 and record.counters["mma"] == 0


def test_compiled_code_follows_the_setting(setting):
    inputs = attention_inputs(1, 1, 14, 8, seed=1)
    attention = torch.compile(
        functools.partial(block_causal_attention, scale_lens=(1, 4, 9), backend="cuda"), fullgraph=True, backend="eager"
    )
    for precision in ("tf32", "ieee", "tf32"):
        setting.fp32_precision = precision
        with emulation() as record:
            attention(*inputs)
        assert (record.counters["mma"] > 0) == (precision == "tf32")


def test_opcheck():
    q, k, v = randn(2, 14, 3, 2, 8, seed=23).permute(2, 0, 3, 1, 4).unbind()
    with emulation():
        op = emulated("fast").ops._block_causal_attention.default
        torch.library.opcheck(op, (q, k, v, [1, 4, 9], 0.5, 0, True))


def test_every_order_gives_the_same_bits():
    inputs = attention_inputs(1, 1, 91, 64, seed=3)
    orders = [(seed, late_copies) for seed in (0, 1, 9) for late_copies in (True, False)]
    results = [forward(inputs, SHORT, seed=seed, late_copies=late_copies) for seed, late_copies in orders]
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nan_and_inf_as_in_plain_pytorch(bad):
    """The values are in keys, where -inf hides a key, or in values. The small part of an infinite number is NaN."""
    q, k, v = attention_inputs(1, 1, 70, 24, seed=23)
    for tensor in (k, v):
        for keys in (slice(40, 41), slice(None)):
            spoiled = tensor.clone()
            spoiled[:, :, keys] = bad
            forward((q.abs(), spoiled, v) if tensor is k else (q, k, spoiled), (70,))


def test_sanitizers_find_nothing():
    KERNELS.assert_sanitizers_find_nothing("""
        from tests.kernels.block_causal_attention import test_cuda_tf32 as tests
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        for dim in (64, 100):
            tests.forward(tests.attention_inputs(1, 2, 91, dim, seed=1), tests.SHORT, "sanitized")
    """)


@needs_nvcc
@pytest.mark.parametrize(("dim", "lens"), [(64, (1, 4, 9, 16, 36, 13)), (100, (5, 37))])
def test_ptx_is_accurate(dim, lens):
    from tools.gpu_emulation.cuda.ptx import execute_ptx_of

    forward(attention_inputs(1, 1, sum(lens), dim, seed=15), lens, executor=execute_ptx_of(SOURCE))


# ---- planted faults ------------------------------------------------------------------------------------------------

TF32 = "block_causal_attention_tf32.cuh"
FAULTS = {
    "one small part is forgotten": Mutant(
        TF32, "  ptx::mma_m16n8k8_tf32(rest, a.big, x.small, y.small);\n", "", "values", representative=True),
    "values in another order than p": Mutant(
        TF32, "p[k][0], p[k][2], p[k][1], p[k][3]", "p[k][0], p[k][1], p[k][2], p[k][3]", "values"),
    "unspecified bits are taken for zeros": Mutant(TF32, " & 0xffffe000u;", ";", "values"),
    "no barrier before the values": Mutant(
        TF32, "__syncthreads();\n  stages.start_values(block + 1)", "stages.start_values(block + 1)", "race"),
}  # fmt: skip


def steps(faulty, looked_for):
    yield lambda: forward(attention_inputs(1, 1, 91, 64, seed=1), SHORT, faulty, seed=1)


@pytest.mark.parametrize("name", parameters(FAULTS, others=pytest.mark.evidence))
def test_planted_faults_are_found(name, selected):
    assert_found(SOURCE, FAULTS, name, steps, selected("name"), ("float",))


@pytest.mark.evidence
def test_nothing_is_found_without_a_fault():
    assert_nothing_found(SOURCE, FAULTS, steps)
