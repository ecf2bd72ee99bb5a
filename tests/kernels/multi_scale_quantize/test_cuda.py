"""The CUDA kernels of multi_scale_quantize and next_scale_input: emulated, compiled, with planted faults (on a CPU)."""

import functools

import pytest
import torch

from tests.helpers.cuda_emulation import EmulatedKernels
from tests.kernels.multi_scale_quantize.contract import (
    SHAPES,
    assert_exact_far_from_the_origin,
    assert_right,
    assert_right_step,
    gradients,
    inputs,
    leaves,
    pairs,
)
from tools.gpu_emulation.cuda import build, nvcc
from tools.gpu_emulation.cuda.mutants import Mutant, assert_found, assert_nothing_found, parameters
from tools.report import machine_code
from var_kernels import multi_scale_quantize, next_scale_input
from var_kernels.native import build as native_build
from var_kernels.testing import assert_accurate, randn, stated_order

if build.unavailable_reason() is not None:
    pytest.skip(build.unavailable_reason(), allow_module_level=True)

FORWARD = native_build.CSRC / "cuda" / "multi_scale_quantize.cu"
BACKWARD = native_build.CSRC / "cuda" / "multi_scale_quantize_backward.cu"
KERNELS = EmulatedKernels(FORWARD, BACKWARD)
emulated, emulation = KERNELS.load, KERNELS.serving
# (batch, channels, codes, convolutions, maps), in addition to the shapes of all backends: several tiles of 16×16 pixels
# and of 32 channels.
TILED = (2, 33, 30, 2, ((1, 1), (3, 5), (17, 19)))
LARGE = (6, 3, 9, 1, ((1, 1), (100, 70)))  # a residual map that is too large for a block


def forward_and_backward(tensors, maps, **options):
    arguments = leaves(tensors)
    result = multi_scale_quantize(*arguments, maps, **options, backend="cuda")
    return result, gradients(result, arguments)


def check(shape, variant="fast", *, seed=0, executor=None, metric="l2"):
    """Compares forward and backward of `shape` with the reference; returns the counters of the emulation."""
    tensors, maps = inputs(shape), shape[-1]
    with emulation(variant, seed=seed, late_copies=seed % 2 == 0, executor=executor) as record:
        found, derivatives = forward_and_backward(tensors, maps, metric=metric)
    assert_right(found, derivatives, tensors, maps, metric=metric)
    return record.counters


# ---- accuracy, races, bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(name):
    for seed, metric in enumerate(("l2", "cosine")):
        check(SHAPES[name], seed=seed, metric=metric)


def test_codes_far_from_the_origin():
    # One image is searched by the kernels of single steps, six by the resident kernel.
    for images in (1, 6):
        with emulation():
            assert_exact_far_from_the_origin(functools.partial(multi_scale_quantize, backend="cuda"), images)


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("VAR", "two strips")])
def test_races_and_bounds(name):
    check(SHAPES[name], "race", seed=7)


def test_several_tiles():
    check(TILED, seed=3)
    check(TILED, "race", seed=1, metric="cosine")


# If the residual fits a block, forward is one launch after that of the centre. Otherwise each scale takes several: a
# pool, a search with its candidates, and an update. Backward takes 7 launches.
@pytest.mark.parametrize(("shape", "launches"), [(SHAPES["nine images"], 2), (LARGE, 2 + 3 * 2 + 1)])
def test_one_launch_if_the_residual_fits_a_block(shape, launches):
    tensors = inputs(shape)
    with emulation() as record:
        found = multi_scale_quantize(*tensors, shape[-1], backend="cuda")
    with stated_order():
        plain, exact = (multi_scale_quantize(*(x.to(dtype) for x in tensors), shape[-1], backend="reference")
                        for dtype in (torch.float32, torch.float64))  # fmt: skip
    assert record.counters["launches"] == launches
    assert torch.equal(found.tokens, exact.tokens)
    assert_accurate(found.f_hat, plain.f_hat, exact.f_hat, name="f_hat")


def test_stepwise_and_resident_kernels_give_the_same_bits():
    # For one image, the kernels of single steps serve, because one block would leave the rest of the emulated GPU idle.
    # For six images, the resident kernel serves.
    shape = (1, 32, 1500, 2, (1, 4, 8))
    tensors = inputs(shape)
    with emulation() as record:
        stepwise = multi_scale_quantize(*tensors, shape[-1], backend="cuda")
        resident = multi_scale_quantize(tensors[0].repeat(6, 1, 1, 1), *tensors[1:], shape[-1], backend="cuda")
    assert record.counters["launches"] == 2 + 3 * (1 + 2 + 1) + 1 + 2
    assert torch.equal(resident.tokens, stepwise.tokens.repeat(6, 1))
    assert torch.equal(resident.f_hat, stepwise.f_hat.repeat(6, 1, 1, 1))


@pytest.mark.parametrize("variant", ["fast", "race"])
def test_next_scale_input(variant):
    for shape in (SHAPES["larger on the way"], SHAPES["wide"], TILED):
        f_hat, _, *phi = inputs(shape, seed=2)
        f_hat = f_hat.contiguous(memory_format=torch.channels_last)
        for k, (height, width) in enumerate(pairs(shape[-1])):
            codes = randn(shape[0], height * width, 2 * shape[1], seed=20 + k)[..., : shape[1]]
            with emulation(variant, seed=k):
                found = next_scale_input(f_hat, codes, *phi, shape[-1], k, phi_ratio=0.4, backend="cuda")
            assert_right_step(found, (f_hat, codes, *phi), shape[-1], k, phi_ratio=0.4)


def test_every_order_gives_the_same_bits():
    shape = (17, 8, 40, 2, (1, 3, 5))  # slices of two images; the last slice has one
    results = []
    for seed in (0, 1, 2, 9):
        with emulation(seed=seed):
            result, derivatives = forward_and_backward(inputs(shape), shape[-1])
        results.append([*result, *derivatives])
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


def test_sanitizers_find_nothing():
    KERNELS.assert_sanitizers_find_nothing("""
        from tests.kernels.multi_scale_quantize import test_cuda as tests
        for name in ("narrow", "one scale", "larger on the way", "wide"):
            tests.check(tests.SHAPES[name], "sanitized", seed=1)
    """)


# ---- layouts, non-finite values, the call --------------------------------------------------------------------------


def test_strided_inputs():
    shape = SHAPES["one vector"]
    f, codebook, weight, bias = inputs(shape)
    with emulation("race"):
        expected = multi_scale_quantize(f, codebook, weight, bias, shape[-1], backend="cuda")
        strided = (
            f.contiguous(memory_format=torch.channels_last), torch.nn.functional.pad(codebook, (1, 3))[:, 1:-3],
            weight.mT.contiguous().mT, bias.T.contiguous().T,
        )  # fmt: skip
        found = multi_scale_quantize(*strided, shape[-1], backend="cuda")
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_f_hat_is_nan_where_f_is_not_finite():
    shape = SHAPES["one vector"]
    f, *others = inputs(shape)
    f[1, 2, 3, 4], f[2, 0, 0, 0] = torch.nan, torch.inf
    with emulation():
        found = multi_scale_quantize(f, *others, shape[-1], backend="cuda")
    expected = multi_scale_quantize(f, *others, shape[-1], backend="reference")
    assert torch.equal(found.f_hat.isnan(), expected.f_hat.isnan()) and torch.equal(found.tokens, expected.tokens)


def test_empty_batch_of_raw_ops():
    f, codebook, *phi = inputs((0, 4, 9, 2, (1, 3)))
    ops, maps = emulated("race").ops, ([1, 3], [1, 3], [0, 1])
    with emulation("race") as record:
        tokens, f_hat, errors = ops._multi_scale_quantize(f, codebook, *phi, *maps, 0.5, False)
        derivatives = ops._multi_scale_quantize_backward(f, codebook, *phi, tokens, errors, *maps, 0.5)
        steps = ops._next_scale_input(f, torch.zeros(0, 1, 4), *phi, 0, 1, 1, 3, 3, 0.5)
    assert record.counters["launches"] == 0 and tokens.shape == (0, 10) and errors.shape == (0, 2)
    assert f_hat.shape == steps[0].shape == f.shape and steps[1].shape == (0, 9, 4)
    assert [x.shape for x in derivatives] == [x.shape for x in (f, codebook, *phi)]
    assert not any(x.any() for x in derivatives)


def test_raw_op_checks_its_arguments():
    op = emulated("fast").ops._multi_scale_quantize
    f, codebook, weight, bias = inputs((1, 4, 9, 2, (1, 3)))
    many = [1] * 64 + [3]
    for message, changed in {
        "f: expected float32, got Half": {"f": f.half()},
        r"codebook: expected shape \(9, 4\), got shape \(9, 3\)": {"codebook": codebook[:, :3]},
        r"phi_weight: expected shape \(2, 4, 4, 3, 3\), got shape \(2, 4, 4, 3, 2\)": {"weight": weight[..., :2]},
        "heights, widths: expected the full size as last entry, got 2 and 3": {"heights": [1, 2]},
        "phi_index: expected an index of phi_weight, got 2": {"phi_index": [0, 2]},
        "heights, widths: expected at most 64 scales, got 65": {
            "heights": many, "widths": many, "phi_index": [0] * 65,
        },
    }.items():
        arguments = {"f": f, "codebook": codebook, "weight": weight, "bias": bias, "heights": [1, 3], "widths": [1, 3],
                     "phi_index": [0, 1]} | changed  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            op(*arguments.values(), 0.5, False)


def test_opcheck():
    f, codebook, *phi = inputs((2, 4, 9, 2, (1, 3)))
    ops, maps = emulated("fast").ops, ([1, 3], [1, 3], [0, 1])
    with emulation():
        torch.library.opcheck(ops._multi_scale_quantize.default, (f, codebook, *phi, *maps, 0.5, False))
        tokens, _, errors = ops._multi_scale_quantize(f, codebook, *phi, *maps, 0.5, False)
        arguments = (f, codebook, *phi, tokens, errors, *maps, 0.5)
        torch.library.opcheck(ops._multi_scale_quantize_backward.default, arguments)
        torch.library.opcheck(ops._next_scale_input.default, (f, randn(2, 1, 4, seed=1), *phi, 0, 1, 1, 3, 3, 0.5))


# ---- the code that nvcc compiles -----------------------------------------------------------------------------------


@pytest.mark.skipif(nvcc.unavailable_reason() is not None, reason=str(nvcc.unavailable_reason()))
@pytest.mark.parametrize("shape", [(2, 4, 20, 2, (1, 3, 5)), (1, 5, 9, 2, ((1, 2), (4, 3))), (1, 36, 30, 1, (1, 2))],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_ptx_is_accurate(shape, metric):
    """Executes the code that nvcc compiles for sm_80 in the PTX interpreter, called from the same entry functions."""
    from tools.gpu_emulation.cuda.ptx import execute_ptx_of

    check(shape, metric=metric, executor=execute_ptx_of(FORWARD, BACKWARD))


# Two blocks of 256 threads fit on a multiprocessor, and one block of the resident kernel.
REGISTERS = {
    "quantize_resident_kernel": 255, "nearest_code_kernel": 168, "quantize_update_kernel": 128, "add_scale_kernel": 128,
    "scale_maps_kernel": 128, "code_maps_kernel": 128, "phi_gradients_kernel": 128, "": 64,
}  # fmt: skip


@pytest.mark.evidence
@pytest.mark.parametrize("arch", machine_code.ARCHS)
@pytest.mark.parametrize("source", [FORWARD, BACKWARD], ids=lambda source: source.stem)
def test_machine_code(source, arch, selected):
    kernels = machine_code.kernels(source, arch, selected("arch"))
    assert len(kernels) == (3 * 2 + 8 + 6 if source == FORWARD else 2 * 2 + 5)
    for kernel in kernels:
        machine_code.assert_resources(kernel, REGISTERS)
        if kernel.name.startswith(("quantize_resident", "quantize_update", "add_scale", "scale_maps", "code_maps")):
            wide = len(kernel.having("LDS")) - len(kernel.narrow("LDS"))
            assert wide >= 10 + 12 and not kernel.having("HMMA"), f"{kernel.name}: {wide} wide loads"


# ---- planted faults ------------------------------------------------------------------------------------------------

MAP, RESIDENT, GRADIENTS = (f"multi_scale_quantize{part}.cuh" for part in ("_map", "", "_backward"))
FORWARD_MUTANTS = {
    "the residual is read too early": Mutant(RESIDENT, "__syncthreads();  // the residual is complete;", "//", "race",
                                             representative=True),
    "no barrier before the pixels": Mutant(MAP, "    __syncthreads();\n    fill_pixels", "    fill_pixels",
                                           "undefined"),
    "no barrier after the weights": Mutant(MAP, "store(memory.weights);\n      __syncthreads();",
                                           "store(memory.weights);", "race"),
    "no barrier before the weights": Mutant(MAP, "if (i > 0) __syncthreads();  // the weights", "// the weights",
                                            "race"),
    "a pixel of the next row": Mutant(MAP, "if (x + p < shape.width) f(",
                                      "if (x + p <= shape.width && y * shape.width + x + p < shape.pixels()) f(",
                                      "race"),
    "tokens of another image": Mutant(RESIDENT, "a.tokens[int64_t(image) * a.length + scale", "a.tokens[scale",
                                      "cross_block_race"),
    "the border is not zero": Mutant(
        MAP, "exists ? pixel(row, column, c) : float4{};",
        "pixel(min(max(row, 0), shape.height - 1), min(max(column, 0), shape.width - 1), c * exists);", "values"),
    "the identity of another pixel": Mutant(MAP, "thread_column() + 1) * kTileChannels + thread_channel();",
                                            "thread_column()) * kTileChannels + thread_channel();", "values"),
    "windows end too early": Mutant(MAP, "x1 = ((j + 1) * shape.width + width - 1) / width",
                                    "x1 = (j + 1) * shape.width / width", "values"),
    "f_hat forgets a scale": Mutant(RESIDENT, "k == 0 ? float4{}", "k <= 1 ? float4{}", "values"),
}  # fmt: skip
BACKWARD_MUTANTS = {
    "no barrier between two strips": Mutant(
        GRADIENTS, "__syncthreads();  // all threads are done with the previous strip", "", "race"),
    "slices share their sums": Mutant(GRADIENTS, "a.partials + (int64_t(slice) * a.scales + k) * a.phi_floats();",
                                      "a.partials + k * a.phi_floats();", "cross_block_race"),
    "weights are not mirrored": Mutant(MAP, "* 9 + 8 - tap]", "* 9 + tap]", "values", representative=True),
    "pixels out of reach": Mutant(GRADIENTS, "(2 * int64_t(index) - 3)", "(2 * int64_t(index))", "values"),
    "later scales are not taken off": Mutant(GRADIENTS, "    add_scaled(difference, -1.0f, h);\n", "", "values"),
    "the last tokens are left out": Mutant(GRADIENTS, "first < count; first += 32", "first + 32 < count; first += 32",
                                           "values"),
}  # fmt: skip

SMALL = (2, 12, 40, 2, (1, 4, (9, 10)))  # two strips; windows that overlap


def outcome(emulated_kernels, source):
    """The results of the kernels in `source` for SMALL, as a list of tensors."""
    tensors, maps = inputs(SMALL), [[side[i] for side in pairs(SMALL[-1])] for i in range(2)] + [[0, 1, 1]]
    with emulation(emulated_kernels, seed=1):
        if source == FORWARD:
            return list(emulated_kernels.ops._multi_scale_quantize(*tensors, *maps, 0.5, False))
        tokens = multi_scale_quantize(*tensors, SMALL[-1], backend="reference").tokens
        derrors = randn(2, 3, seed=5)
        backward = emulated_kernels.ops._multi_scale_quantize_backward
        return list(backward(*tensors, tokens, derrors, *maps, 0.5))


def steps(faulty, looked_for, source):
    def same_results():
        found, expected = outcome(faulty, source), outcome(emulated("fast"), source)
        assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(found, expected, strict=True))

    yield same_results if looked_for == "values" else functools.partial(outcome, faulty, source)


PLANTED = ((FORWARD, FORWARD_MUTANTS), (BACKWARD, BACKWARD_MUTANTS))


@pytest.mark.parametrize(
    "name",
    [
        name
        for _, mutants in PLANTED
        for name in parameters(mutants, others=pytest.mark.evidence)
    ],
)
def test_planted_faults_are_found(name, selected):
    source, mutants = next(each for each in PLANTED if name in each[1])
    assert_found(source, mutants, name, functools.partial(steps, source=source), selected("name"), ("float",))


@pytest.mark.evidence
@pytest.mark.parametrize(("source", "mutants"), PLANTED, ids=("forward", "backward"))
def test_nothing_is_found_without_a_fault(source, mutants):
    assert_nothing_found(source, mutants, functools.partial(steps, source=source))
