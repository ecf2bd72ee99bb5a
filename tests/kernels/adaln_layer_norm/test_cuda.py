"""The CUDA kernels of adaln_layer_norm and gated_residual_adaln: emulated, compiled, with planted faults (on a CPU)."""

import functools
import itertools

import pytest
import torch

from tests.helpers.cuda_emulation import EmulatedKernels
from tests.kernels.adaln_layer_norm.contract import (
    FORMS,
    assert_accurate_mixed,
    assert_accurate_results,
    assert_gradients_of_empty_inputs,
    assert_raw_op_checks,
    inputs,
    mixed_inputs,
    outputs,
    rotated_forms,
    values_and_gradients,
)
from tools.gpu_emulation.cuda import build
from tools.gpu_emulation.cuda.mutants import Mutant, assert_found, assert_nothing_found, parameters
from tools.report import machine_code
from var_kernels import gated_residual_adaln
from var_kernels.native import build as native_build
from var_kernels.testing import modulation, randn

if build.unavailable_reason() is not None:
    pytest.skip(build.unavailable_reason(), allow_module_level=True)

SOURCE = native_build.CSRC / "cuda" / "adaln_layer_norm.cu"
KERNELS = EmulatedKernels(SOURCE)
emulated, emulation = KERNELS.load, KERNELS.serving
OPS = ("adaln", "gated")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A pack is 4 channels in fp32 and 8 in 16 bits. A warp holds 256 channels in packs of 8, or 512 with twice the packs.
VECTOR_SHAPES = [(2, 5, 8), (3, 2, 248), (1, 9, 256), (2, 3, 264), (1, 3, 520), (1, 2, 1032), (2, 17, 40), (5, 1, 24)]
# Rows that are not aligned. Some are longer than the 256 channels up to which the plain kernels use one warp for a row.
PLAIN_SHAPES = [(2, 5, 3), (1, 3, 31), (1, 6, 33), (2, 2, 257), (1, 1, 1), (4, 1, 9)]
LONG_SHAPE = (1, 2, 4104)  # too many channels for the registers of backward


def run(variant, op, tensors, *, seed=0, executor=None, **options):
    """Values and gradients of the emulated kernels; raises EmulationError with their findings."""
    with emulation(variant, seed=seed, executor=executor):
        return values_and_gradients(op, tensors, "cuda", **options)


def assert_op_accurate(variant, op, tensors, *, seed=0, executor=None, **options):
    actual = run(variant, op, tensors, seed=seed, executor=executor, **options)
    assert_accurate_results(actual, op, tensors, **options)


# ---- accuracy, races, bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_accurate_over_shapes(op, dtype, variant):
    for index, shape in enumerate(VECTOR_SHAPES + PLAIN_SHAPES):
        tensors = inputs(op, shape, seed=index, dtype=dtype, forms=rotated_forms(index))
        assert_op_accurate(variant, op, tensors, seed=(0, 1, 7)[index % 3])


@pytest.mark.parametrize("op", OPS)
def test_accurate_over_modulation_forms(op):
    for index, forms in enumerate(itertools.product(FORMS, repeat=3)):
        if op == "adaln" and forms[0] != FORMS[0]:
            continue  # adaln_layer_norm has no gate
        channels = 24 if index % 3 else 23
        assert_op_accurate("race" if index % 4 == 0 else "fast", op, inputs(op, (2, 9, channels), seed=7, forms=forms))


def assert_mixed_accurate(variant, tensors, seed=0, executor=None):
    with emulation(variant, seed=seed, executor=executor):
        found = gated_residual_adaln(*tensors, backend="cuda")
    assert_accurate_mixed(found, tensors)


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_branch_of_another_dtype(dtype, variant):
    for index, shape in enumerate(VECTOR_SHAPES + PLAIN_SHAPES):
        tensors = mixed_inputs(shape, dtype, seed=index, forms=rotated_forms(index))
        assert_mixed_accurate(variant, tensors, seed=(0, 1, 7)[index % 3])


@pytest.mark.parametrize("op", OPS)
def test_many_tokens_for_each_worker(op):
    # There are more rows than warps: modulation stays in registers from token to token, and sums are over many tokens.
    assert_op_accurate("fast", op, inputs(op, (3, 1500, 16), seed=1, dtype=torch.bfloat16), seed=3)
    assert_op_accurate("race", op, inputs(op, (1, 40, 520), seed=1, dtype=torch.bfloat16), seed=3)


@pytest.mark.parametrize("forms", [("(B,L,C)", "(B,C)", "(B,C)"), ("(B,C)", "(B,L,C)", "(B,L,C)")])
@pytest.mark.parametrize("op", OPS)
def test_modulation_per_token_with_many_tokens_for_each_worker(op, forms):
    assert_op_accurate("fast", op, inputs(op, (3, 1500, 16), seed=1, dtype=torch.bfloat16, forms=forms), seed=3)


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("op", OPS)
def test_rows_longer_than_the_registers(op, variant):
    assert_op_accurate(variant, op, inputs(op, LONG_SHAPE, seed=2, forms=("(1,1,C)", "(B,1,C)", "(B,L,C)")))


@pytest.mark.parametrize("channels", [24, 23])
@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["y only", "residual only"])
def test_accurate_with_one_output_used(use, channels):
    assert_op_accurate("race", "gated", inputs("gated", (2, 9, channels), seed=3), use=use)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_far_from_zero(dtype):
    x, scale, shift = inputs("adaln", (1, 2, 1024), seed=5, dtype=torch.float64)
    assert_op_accurate("fast", "adaln", [tensor.to(dtype) for tensor in (x + 200, scale, shift)])


def test_sanitizers_find_nothing():
    KERNELS.assert_sanitizers_find_nothing("""
        from tests.kernels.adaln_layer_norm import test_cuda as tests
        for index, shape in enumerate([(2, 5, 8), (1, 3, 264), (2, 5, 3), (1, 2, 33), (1, 9, 520)]):
            for op, dtype in (("adaln", torch.bfloat16), ("gated", torch.float16), ("gated", torch.float32)):
                tensors = tests.inputs(op, shape, seed=index, dtype=dtype, forms=tests.rotated_forms(index))
                tests.assert_op_accurate("sanitized", op, tensors, seed=index)
            tests.assert_mixed_accurate("sanitized", tests.mixed_inputs(shape, torch.bfloat16), seed=index)
    """)


# ---- layouts, emptiness, determinism -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs(op):
    dense = inputs(op, (2, 6, 40), seed=11, dtype=torch.bfloat16)
    expected = run("fast", op, dense)

    def check(name, make, exactly):
        result = run("race", op, [make(tensor) for tensor in dense])
        for key, value in expected.items():
            if exactly:
                assert torch.equal(result[key], value), f"{name}: {key}"
            else:
                torch.testing.assert_close(result[key], value)

    check("outer stride", lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]], True)
    check("transposed tokens", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), True)
    check("inner stride", lambda t: torch.stack([t, t + 1], dim=-1)[..., 0], True)
    # These are not aligned to 16 bytes, which selects the plain kernel, whose sums have another order.
    check("offset", lambda t: torch.cat([t[..., :1], t], dim=-1)[..., 1:], False)


def test_chunk_views():
    views = modulation(2, 40, seed=3, parts=6, dtype=torch.float16)
    x, branch = randn(2, 6, 40, seed=1, dtype=torch.float16), randn(2, 6, 40, seed=2, dtype=torch.float16)
    tensors = [x, branch, views[0], views[2], views[5]]
    expected = run("fast", "gated", [tensor.clone() for tensor in tensors])
    assert all(torch.equal(value, expected[key]) for key, value in run("race", "gated", tensors).items())


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty_raw_ops(shape):
    with emulation("race"):
        assert_gradients_of_empty_inputs(emulated("race").ops, shape)


@pytest.mark.parametrize("op", OPS)
def test_bit_equal_in_every_order(op):
    tensors = inputs(op, (2, 13, 264), seed=16, dtype=torch.bfloat16)
    results = [run("fast", op, tensors, seed=seed) for seed in (0, 1, 2, 9)]
    for result in results[1:]:
        assert all(torch.equal(value, results[0][key]) for key, value in result.items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_stay_in_their_row(bad):
    for channels in (40, 41):
        tensors = inputs("adaln", (2, 5, channels), seed=14)
        clean = run("fast", "adaln", tensors)["output 0"]
        tensors[0][1, 3, 17] = bad
        y = run("fast", "adaln", tensors)["output 0"]
        assert y[1, 3].isnan().all()
        clean[1, 3] = torch.nan
        assert torch.equal(y.isnan(), clean.isnan()) and torch.equal(y.nan_to_num(0), clean.nan_to_num(0))


def test_raw_op_checks_its_arguments():
    assert_raw_op_checks(emulated("fast").ops._adaln_layer_norm)


def test_opcheck():
    ops, check = emulated("fast").ops, torch.library.opcheck
    x, branch, gate, scale, shift = inputs("gated", (2, 5, 20), seed=1, dtype=torch.bfloat16)
    with emulation():
        check(ops._gated_residual_adaln.default, (x, branch, gate, scale, shift, 1e-6))
        residual, y, mean, rstd = ops._gated_residual_adaln(x, branch, gate, scale, shift, 1e-6)
        arguments = (x, None, residual, branch, gate, scale, mean, rstd, True, False)
        check(ops._gated_residual_adaln_backward.default, arguments)


def test_outputs_without_gradients():
    tensors = inputs("gated", (2, 5, 20), seed=1)
    with emulation() as record:
        residual, y = outputs("gated", tensors, "cuda")
    assert record.counters["launches"] == 1 and residual.shape == y.shape == (2, 5, 20)


# ---- the code that nvcc compiles ----------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(native_build.find_nvcc() is None, reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_ptx_is_accurate(op, dtype):
    """Executes the code that nvcc compiles for sm_80 in the PTX interpreter, called from the same entry function."""
    from tools.gpu_emulation.cuda.ptx import execute_ptx_of

    executor = execute_ptx_of(SOURCE)
    for index, shape in enumerate([(1, 3, 264), (2, 5, 40), (1, 2, 33), (3, 5, 7)]):
        tensors = inputs(op, shape, seed=index, dtype=dtype, forms=rotated_forms(index))
        assert_op_accurate("fast", op, tensors, executor=executor)


@needs_nvcc
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_ptx_is_accurate_with_a_branch_of_another_dtype(dtype):
    from tools.gpu_emulation.cuda.ptx import execute_ptx_of

    executor = execute_ptx_of(SOURCE)
    for index, shape in enumerate([(1, 3, 264), (2, 5, 40), (1, 2, 33)]):
        assert_mixed_accurate("fast", mixed_inputs(shape, dtype, seed=index), executor=executor)


# The registers with which as many blocks fit on a multiprocessor as the partition of the work assumes, by kernel.
REGISTERS = {
    "forward_kernel<bf16, false, 2, bf16>": 88,
    "forward_kernel<bf16, true, 2, bf16>": 112,
    "backward_kernel<bf16, false, 1>": 96,
    "sum_partials_kernel": 40,
    "": 128,
}


@pytest.mark.evidence
@pytest.mark.parametrize("arch", machine_code.ARCHS)
def test_machine_code(arch, selected):
    kernels = machine_code.kernels(SOURCE, arch, selected("arch"))
    assert len(kernels) == 39
    for kernel in kernels:
        machine_code.assert_resources(kernel, REGISTERS)
        if kernel.name.startswith(("forward_kernel", "backward_kernel")):
            narrow_loads = 2 if kernel.name.startswith("backward") else 0  # mean and rstd
            narrow_stores = 2 - narrow_loads
            if kernel.name.startswith("forward_kernel<float, true") and not kernel.name.endswith("float>"):
                # Branch and y have half the bytes: accesses of 8 for each 16 bytes of x, none narrower.
                halves = int(kernel.name.split(",")[2])
                assert sum(".64" in line for line in kernel.narrow("LDG")) == halves, kernel.having("LDG")
                narrow_loads, narrow_stores = halves, narrow_stores + halves
            assert len(kernel.narrow("LDG")) <= narrow_loads, f"{kernel.name}: {kernel.having('LDG')}"
            assert len(kernel.narrow("STG")) <= narrow_stores, f"{kernel.name}: {kernel.having('STG')}"


# ---- planted faults -----------------------------------------------------------------------------------------------

HEADER, BACKWARD, DOOR = "adaln_layer_norm.cuh", "adaln_layer_norm_backward.cuh", "adaln_layer_norm.cu"
MUTANTS = {
    "no barrier in the sum": Mutant(
        HEADER, "  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < N; ++i) v[i] = 0.0f;",
        "#pragma unroll\n  for (int i = 0; i < N; ++i) v[i] = 0.0f;", "race"),
    "one buffer for both sums": Mutant(
        HEADER, "sum_over_row(sum, exchange[1])", "sum_over_row(sum, exchange[0])", "race", 2),
    "one buffer for all tokens": Mutant(BACKWARD, "exchange[token & 1]", "exchange[0]", "race", 2),
    "no guard on the columns": Mutant(
        HEADER, "c < channels && rows.data != nullptr", "rows.data != nullptr", "out_of_bounds"),
    "no guard on the workers": Mutant(HEADER, "if (sample >= partition.samples)", "if (sample < 0)", "out_of_bounds"),
    "one row of partial sums": Mutant(
        BACKWARD, "grad.partial + int64_t(worker) * channels", "grad.partial", "cross_block_race", representative=True),
    "padding in the variance": Mutant(
        HEADER, "exists ? (v[j] - mean) * (v[j] - mean) : 0.0f",
        "exists | true ? (v[j] - mean) * (v[j] - mean) : 0.0f", "values", representative=True),
    "modulation of the first token": Mutant(HEADER, "if (first || a.scale.per_token != 0)", "if (first)", "values"),
    "modulation of the first token in backward": Mutant(
        BACKWARD, "if (first || a.scale.per_token != 0)", "if (first)", "values"),
    "no check of the alignment": Mutant(
        DOOR, "reinterpret_cast<uintptr_t>(rows->data) % 16 == 0 && ", "", "misaligned"),
    "two elements of y swapped": Mutant(
        HEADER, "ptx::store8(p, pack_half<T>(v))", "ptx::store8(p, pack_half<T>({v[0], v[1], v[3], v[2]}))", "values"),
    "the first half of the branch": Mutant(HEADER, "ptx::load8(row + c)", "ptx::load8(row + c / 8 * 8)", "values"),
    "the column of whole packs": Mutant(
        HEADER, "column(i, sizeof(Pack) / sizeof(T))", "column(i, kPackWidth<T>)", "values"),
}  # fmt: skip


def steps(emulation, looked_for):
    # The last shape has more tokens than there are warps, so that each worker of forward gets several.
    for index, shape in enumerate([(1, 9, 264), (1, 9, 1032), (3, 5, 40)] + [(3, 1500, 16)] * (looked_for == "values")):
        tensors = inputs("adaln", shape, seed=index, dtype=torch.bfloat16, forms=("(B,C)", "(B,L,C)", "(B,1,C)"))
        if looked_for == "misaligned":
            tensors[0] = torch.nn.functional.pad(tensors[0], (1, 7))[..., 1:-7]
        elif looked_for != "values":
            tensors[1] = tensors[1][:, :1]  # so that dscale is a sum as well
        yield functools.partial(assert_op_accurate, emulation, "adaln", tensors, seed=index)
    yield lambda: assert_mixed_accurate(emulation, mixed_inputs((1, 9, 264), torch.bfloat16))


@pytest.mark.parametrize("name", parameters(MUTANTS, others=pytest.mark.evidence))
def test_planted_faults_are_found(name, selected):
    assert_found(SOURCE, MUTANTS, name, steps, selected("name"), ("bf16",))


@pytest.mark.evidence
def test_nothing_is_found_without_a_fault():
    assert_nothing_found(SOURCE, MUTANTS, steps)
