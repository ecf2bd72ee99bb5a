"""The Triton kernels of adaln_layer_norm and gated_residual_adaln, executed on a CPU in two ways.

Triton's interpreter runs the source (fp32, fp16). The PTX interpreter runs the code compiled for sm_80 (bf16 as well).
"""

import contextlib
import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.adaln_layer_norm.contract import (  # noqa: E402  # noqa: E402
    ARGUMENTS,
    OPS,
    assert_accurate_mixed,
    assert_accurate_results,
    assert_compiles,
    assert_gradients_of_empty_inputs,
    inputs,
    mixed_inputs,
    outputs,
    rotated_forms,
    values_and_gradients,
)
from tools.gpu_emulation.triton import executing, interpret, run_ptx  # noqa: E402
from var_kernels import adaln_layer_norm, gated_residual_adaln  # noqa: E402
from var_kernels.testing import assert_accurate, modulation, poison, randn, stated_order  # noqa: E402
from var_kernels.triton import adaln_layer_norm as kernels  # noqa: E402
from var_kernels.triton import configs  # noqa: E402
from var_kernels.triton.configs import Config  # noqa: E402
from var_kernels.triton.launch import executor  # noqa: E402
from var_kernels.triton.offline import compilations, compile_for  # noqa: E402
from var_kernels.triton.targets import TARGETS, assume  # noqa: E402

# With one multiprocessor, a program gets several tiles of rows, and its last tile may be partly empty.
SMALL_GPU = dataclasses.replace(TARGETS["sm_80"], name="small", multiprocessors=1)
SMALL_TILES = {
    "adaln_layer_norm.adaln_forward": Config({"ROWS": 2, "CHUNK": 16}, num_warps=4),
    "adaln_layer_norm.adaln_backward": Config({"ROWS": 4, "CHUNK": 16}, num_warps=4),
    "adaln_layer_norm.sum_partials": Config({"ROWS": 4, "CHUNK": 16}, num_warps=4),
}

# Channels straddle CHUNK, with tails that are whole, padded and of full width. The last shapes straddle the tokens of a
# program and of a tile; the very last one has single tokens, of which a program takes several samples.
SHAPES = [
    *((2, 5, channels) for channels in (1, 7, 15, 16, 17, 24, 27, 32, 36)),
    *((2, length, 20) for length in (1, 2, 3, 25)),
    (1, 1, 40),
    (19, 1, 8),
]


@contextlib.contextmanager
def small(execute=interpret):
    """A context with small tiles on a small GPU."""
    with executing(execute), assume(SMALL_GPU), configs.override(SMALL_TILES):
        yield


def assert_triton_accurate(op: str, tensors, context, **options) -> None:
    with context:
        actual = values_and_gradients(op, tensors, "triton", **options)
    # The norm of a single channel is 0, or a rounding error.
    assert_accurate_results(actual, op, tensors, may_vanish=tensors[0].shape[-1] == 1, **options)


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_accurate_over_shapes(op):
    for index, shape in enumerate(SHAPES):
        dtype = torch.float16 if index % 3 == 0 else torch.float32
        assert_triton_accurate(op, inputs(op, shape, seed=index, dtype=dtype, forms=rotated_forms(index)), small())


@pytest.mark.parametrize("op", OPS)
def test_accurate_over_modulation_forms(op):
    # Every pair of forms for every pair of gate, scale and shift.
    forms = ("(B,1,C)", "(1,1,C)", "(B,L,C)")
    for i, j in itertools.product(range(3), repeat=2):
        tensors = inputs(op, (2, 7, 24), seed=7, forms=(forms[(i + j) % 3], forms[i], forms[j]))
        assert_triton_accurate(op, tensors, small())


@pytest.mark.parametrize("op", OPS)
def test_shipped_tiles_are_accurate(op):
    # Whole tiles, a tail of another width, a tail with padding, and more than one warp for a row.
    for index, (shape, dtype) in enumerate(
        [((2, 3, 1024), torch.float16), ((1, 3, 1152), torch.float32), ((2, 9, 100), torch.float16)]
    ):
        tensors = inputs(op, shape, seed=index, dtype=dtype, forms=("(B,1,C)", "(B,C)", "(1,1,C)"))
        assert_triton_accurate(op, tensors, executing(interpret))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("op", OPS)
def test_compiled_code_is_accurate(op, dtype):
    shapes = [(2, 3, 136), (2, 2, 1152)] if dtype == torch.bfloat16 else [(2, 3, 136)]
    for index, shape in enumerate(shapes):
        assert_triton_accurate(op, inputs(op, shape, seed=index, dtype=dtype), executing(run_ptx))


@pytest.mark.parametrize("forms", [("(B,L,C)", "(1,1,C)", "(B,L,C)"), ("(1,1,C)", "(B,L,C)", "(1,1,C)")], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_compiled_code_is_accurate_in_small_tiles(op, forms):
    tensors = inputs(op, (2, 19, 20), seed=3, dtype=torch.bfloat16, forms=forms)
    assert_triton_accurate(op, tensors, small(run_ptx))


@pytest.mark.parametrize(
    ("dtype", "execute"),
    [(torch.float16, interpret), (torch.bfloat16, run_ptx)],
    ids=["fp16, interpreted", "bf16, PTX"],
)
def test_branch_of_another_dtype(dtype, execute):
    for index, shape in enumerate([(2, 5, 20), (2, 3, 136), (19, 1, 8), (1, 3, 1024)]):
        tensors = mixed_inputs(shape, dtype, seed=index, forms=rotated_forms(index))
        with small(execute) if index < 3 else executing(execute):
            found = gated_residual_adaln(*tensors, backend="triton")
        assert_accurate_mixed(found, tensors)


def test_lanes_agree_on_sums_of_products():
    # In a tail with one element for each thread, the compiler fused the product with the first addition between lanes.
    # The sums of the lanes then differed, and it was undefined which of them a warp passed on. The PTX interpreter
    # reports that.
    tensors = inputs("gated", (1, 2, 1152), seed=3, dtype=torch.bfloat16)
    with executing(run_ptx):
        values_and_gradients("gated", tensors, "triton")


@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["y only", "residual only"])
def test_accurate_with_one_output_used(use):
    assert_triton_accurate("gated", inputs("gated", (2, 7, 24), seed=3), small(), use=use)


def test_mean_far_from_zero():
    # A variance computed as E[x²] - E[x]² would lose every digit here, and so would x·rstd - mean·rstd.
    tensors = inputs("adaln", (2, 4, 300), seed=5)
    tensors[0] += 200
    assert_triton_accurate("adaln", tensors, executing(interpret))


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_eps(eps):
    tensors = [tensor * 0.1 for tensor in inputs("adaln", (2, 5, 33), seed=6)]
    with small():
        actual = adaln_layer_norm(*tensors, eps=eps, backend="triton")
    exact = adaln_layer_norm(*(tensor.double() for tensor in tensors), eps=eps)
    with stated_order():
        same = adaln_layer_norm(*tensors, eps=eps, backend="reference")
    assert_accurate(actual, same, exact)


def test_gated_is_the_composition():
    x, branch, gate, scale, shift = inputs("gated", (2, 9, 36), seed=8, dtype=torch.float16)
    with small():
        residual, y = gated_residual_adaln(x, branch, gate, scale, shift, backend="triton")
        assert torch.equal(y, adaln_layer_norm(residual, scale, shift, backend="triton"))


def test_widest_rows():
    assert_triton_accurate("adaln", inputs("adaln", (1, 1, 16384), seed=8), executing(interpret))
    with executing(interpret), pytest.raises(ValueError, match="x: expected at most 16384 channels in Triton"):
        adaln_layer_norm(*inputs("adaln", (1, 1, 1 << 17), seed=1), backend="triton")


# ---- layouts, emptiness, special values ----------------------------------------------------------------------------


@pytest.mark.parametrize("op, execute", [("adaln", interpret), ("gated", run_ptx)])
def test_strided_inputs(op, execute):
    dense = inputs(op, (2, 3, 40), seed=11)
    with small(execute):
        expected = values_and_gradients(op, dense, "triton")
        for name, make in {
            "outer stride": lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]],
            "transposed tokens": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            "inner stride": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
            "offset": lambda t: torch.cat([t[..., :1], t], dim=-1)[..., 1:],
        }.items():
            result = values_and_gradients(op, [make(tensor) for tensor in dense], "triton")
            for key, value in expected.items():
                assert torch.equal(result[key], value), f"{name}: {key}"


@pytest.mark.parametrize("length", [None, 6], ids=["per sample", "per token"])
def test_chunk_views(length):
    x, branch = randn(2, 6, 40, seed=1), randn(2, 6, 40, seed=2)
    views = modulation(2, 40, seed=3, parts=6, length=length)
    tensors = [x, branch, views[0], views[2], views[5]]
    with small():
        expected = values_and_gradients("gated", [tensor.clone() for tensor in tensors], "triton")
        actual = values_and_gradients("gated", tensors, "triton")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_expanded_gradient():
    # sum().backward() passes a gradient whose strides are all 0.
    tensors = [tensor.requires_grad_() for tensor in inputs("adaln", (2, 6, 40), seed=13)]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = torch.autograd.grad(adaln_layer_norm(*wide).sum(), wide)
    with stated_order():
        plain = torch.autograd.grad(adaln_layer_norm(*tensors, backend="reference").sum(), tensors)
    with small():
        ours = torch.autograd.grad(adaln_layer_norm(*tensors, backend="triton").sum(), tensors)
    for gradients in zip(ours, plain, exact, strict=True):
        assert_accurate(*gradients)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_empty_raw_ops(shape):
    with executing(interpret):
        assert_gradients_of_empty_inputs(torch.ops.var_kernels_triton, shape)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("op", OPS)
def test_nan_and_inf_stay_in_their_row(op, bad):
    tensors = inputs(op, (2, 5, 40), seed=14)
    with small():
        clean = outputs(op, tensors, "triton")[-1]
        tensors[0][1, 3, 17] = bad
        y = outputs(op, tensors, "triton")[-1]
    assert y[1, 3].isnan().all()
    assert torch.equal(y.nan_to_num(0), clean.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(0.0)))


@pytest.mark.parametrize("op", OPS)
def test_writes_every_element(op):
    tensors = inputs(op, (2, 11, 35), seed=15, dtype=torch.float16, forms=("(B,L,C)", "(B,1,C)", "(1,1,C)"))
    with small():
        expected = values_and_gradients(op, tensors, "triton")
        poison()
        for name, value in values_and_gradients(op, tensors, "triton").items():
            assert torch.equal(value, expected[name]), name


# ---- programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_sample", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 680, 8), (96, 680, 8), (5000, 3, 8), (7, 9451, 8)])
def test_programs_cover_every_row_once(shape, by_sample):
    target, config = TARGETS["sm_90"], Config({"ROWS": 2, "CHUNK": 8}, num_warps=4)
    parts = kernels._partition(torch.empty(shape, device="meta"), by_sample, config, target)
    groups = shape[0] if by_sample else 1
    assert groups * parts["rows"] == shape[0] * shape[1]
    assert (parts["programs"] - 1) * parts["rows_per_program"] < parts["rows"]
    assert parts["programs"] * parts["rows_per_program"] >= parts["rows"]
    # No wave of programs is nearly empty, so that at most a quarter of the GPU's time is lost.
    resident = target.multiprocessors * 4
    waves = -(-groups * parts["programs"] // resident)
    rows = groups * (parts["rows"] + parts["rows"] % 2)
    assert waves == 1 or waves * parts["rows_per_program"] * resident <= 1.34 * rows


def test_compiles_once_for_all_batches_and_lengths():
    target, compiled = TARGETS["sm_80"], []

    def compile_only(launch):
        compile_for(launch, target)
        compiled.append(launch.kernel)

    def step(batch, length):
        x, branch, gate, scale, shift = inputs("gated", (batch, length, 48), seed=1, dtype=torch.bfloat16)
        ops = torch.ops.var_kernels_triton
        residual, y, mean, rstd = ops._gated_residual_adaln(x, branch, gate, scale, shift, 1e-6)
        ops._gated_residual_adaln_backward(residual, y, residual, branch, gate, scale, mean, rstd, batch != 1, False)

    with assume(target), executor(compile_only):
        step(2, 4)
        counts = [compilations(kernel, target) for kernel in compiled]
        for batch, length in ((2, 9), (2, 16), (3, 680), (16, 256), (3, 3), (1, 5)):
            step(batch, length)
    assert counts == [compilations(kernel, target) for kernel in compiled[: len(counts)]]


# ---- torch's tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forms", [("(B,1,C)",) * 3, ("(1,1,C)", "(B,L,C)", "(B,1,C)")], ids=str)
def test_opcheck(forms):
    ops, check = torch.ops.var_kernels_triton, torch.library.opcheck
    x, branch, gate, scale, shift = inputs("gated", (2, 3, 20), seed=1, dtype=torch.float16, forms=forms)
    shift_varies = (shift.shape[0] != 1, shift.shape[1] != 1)
    with small():
        y, mean, rstd = ops._adaln_layer_norm(x, scale, shift, 1e-6)
        check(ops._adaln_layer_norm.default, (x, scale, shift, 1e-6))
        check(ops._adaln_layer_norm_backward.default, (y, x, scale, mean, rstd, *shift_varies))
        check(ops._gated_residual_adaln.default, (x, branch, gate, scale, shift, 1e-6))
        for dresidual, dy in ((x, y), (None, y), (x, None)) if forms[0] == forms[1] else ((x, y),):
            arguments = (dresidual, dy, x, branch, gate, scale, mean, rstd, *shift_varies)
            check(ops._gated_residual_adaln_backward.default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_compile(op):
    with small():
        assert_compiles(op, "triton")


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS)
def test_vmap_of_grad(op):
    tensors = inputs(op, (2, 5, 20), seed=1)

    def loss(*args):
        return sum(out.square().sum() for out in outputs(op, args, "triton"))

    numbers = tuple(range(len(ARGUMENTS[op])))
    with small():
        expected = torch.func.grad(loss, argnums=numbers)(*tensors)
        batched = torch.vmap(torch.func.grad(loss, argnums=numbers))(*(torch.stack([t, 2 * t]) for t in tensors))
    assert all(torch.equal(a[0], b) for a, b in zip(batched, expected, strict=True))
