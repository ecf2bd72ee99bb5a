"""adaln_layer_norm and gated_residual_adaln on the CPU: accuracy, layouts, arguments, torch's transformations."""

import itertools

import pytest
import torch

from tests.kernels.adaln_layer_norm.contract import (
    ARGUMENTS,
    FORMS,
    OPS,
    assert_accurate_results,
    assert_compiles,
    assert_gradients_of_empty_inputs,
    assert_raw_op_checks,
    inputs,
    outputs,
    rotated_forms,
    values_and_gradients,
)
from var_kernels import adaln_layer_norm, gated_residual_adaln
from var_kernels.testing import assert_accurate, modulation, poison, randn, stated_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Channels straddle one vector of every ISA level (4, 8, 16 floats) and the sums' groups of four vectors (16, 32, 64);
# tokens straddle the 48 that share a row of partial sums in backward.
SHAPES = [
    *((2, 5, channels) for channels in (3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 79, 129)),
    *((2, length, 20) for length in (1, 2, 47, 48, 49, 97)),
    (1, 1, 1024),
    (1, 7, 1920),
    (3, 50, 2304),
]


def assert_op_accurate(op: str, tensors, **options) -> None:
    assert_accurate_results(values_and_gradients(op, tensors, "cpu", **options), op, tensors, **options)


def assert_forward_accurate(tensors, **options) -> None:
    exact = adaln_layer_norm(*(tensor.double() for tensor in tensors), **options)
    with stated_order():
        same = adaln_layer_norm(*tensors, backend="reference", **options)
    assert_accurate(adaln_layer_norm(*tensors, backend="cpu", **options), same, exact)


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_accurate_over_shapes(cpu, op, dtype):
    for index, shape in enumerate(SHAPES):
        assert_op_accurate(op, inputs(op, shape, seed=index, dtype=dtype, forms=rotated_forms(index)))


@pytest.mark.parametrize("op", OPS)
def test_accurate_in_a_few_shapes(cpu, op):
    # A tail, whole vectors, and both, in every dtype.
    for index, dtype in enumerate(DTYPES):
        for channels in (13, 64, 83):
            forms = rotated_forms(index)
            assert_op_accurate(op, inputs(op, (2, 49, channels), seed=index, dtype=dtype, forms=forms))


@pytest.mark.parametrize("op", OPS)
def test_accurate_over_modulation_forms(cpu, op):
    for forms in itertools.product(FORMS, repeat=3):
        if op == "adaln" and forms[0] != FORMS[0]:
            continue  # adaln_layer_norm has no gate
        assert_op_accurate(op, inputs(op, (2, 50, 24), seed=7, forms=forms))


@pytest.mark.parametrize("op", OPS)
def test_one_token_with_one_modulation_for_all_samples(cpu, op):
    assert_op_accurate(op, inputs(op, (3, 1, 24), seed=7, forms=("(1,1,C)",) * 3))


@pytest.mark.parametrize("op", OPS)
def test_one_channel(cpu, op):
    # The norm of a single value is 0, so y is shift and x has no influence on y.
    tensors = inputs(op, (2, 3, 1), seed=1)
    result = values_and_gradients(op, tensors, "cpu")
    y = result["output 1" if op == "gated" else "output 0"]
    assert torch.equal(y, tensors[-1].expand_as(y))
    assert not result["dscale"].any() and all(value.isfinite().all() for value in result.values())


@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["y only", "residual only"])
def test_accurate_with_one_output_used(cpu, use):
    # The last block of a network uses only one of the two outputs, so that the other one has no gradient.
    assert_op_accurate("gated", inputs("gated", (2, 50, 24), seed=3), use=use)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_far_from_zero(cpu, dtype):
    # A variance computed as E[x²] - E[x]² would lose every digit here.
    x, scale, shift = inputs("adaln", (2, 4, 1024), seed=5, dtype=torch.float64)
    assert_forward_accurate([tensor.to(dtype) for tensor in (x + 200, scale, shift)])


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_eps(cpu, eps):
    assert_forward_accurate([tensor * 0.1 for tensor in inputs("adaln", (2, 5, 33), seed=6)], eps=eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_is_the_composition(cpu, dtype):
    x, branch, gate, scale, shift = inputs("gated", (2, 9, 136), seed=8, dtype=dtype)
    residual, y = gated_residual_adaln(x, branch, gate, scale, shift, backend="cpu")
    assert torch.equal(y, adaln_layer_norm(residual, scale, shift, backend="cpu"))


def test_is_layer_norm_with_modulation():
    # This compares the reference itself with torch's LayerNorm.
    x, scale, shift = inputs("adaln", (2, 5, 48), seed=2, dtype=torch.float64)
    expected = torch.nn.functional.layer_norm(x, (48,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(adaln_layer_norm(x, scale, shift), expected)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck_of_reference(op):
    for forms in (("(B,C)", "(1,1,C)", "(B,L,C)"), ("(B,L,C)", "(B,1,C)", "(1,1,C)")):
        tensors = [t.requires_grad_() for t in inputs(op, (2, 3, 5), seed=4, dtype=torch.float64, forms=forms)]
        torch.autograd.gradcheck(lambda *args: outputs(op, args, "reference"), tensors)


# ---- layouts, emptiness, special values ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_strided_inputs(cpu, op, dtype):
    dense = inputs(op, (2, 6, 40), seed=11, dtype=dtype)
    expected = values_and_gradients(op, dense, "cpu")

    def check(name, make):
        views = [make(tensor) for tensor in dense]
        result = values_and_gradients(op, views, "cpu")
        for key, value in expected.items():
            assert torch.equal(result[key], value), f"{name}: {key}"

    check("outer stride", lambda t: torch.cat([t, t + 1], dim=-1)[..., : t.shape[-1]])
    check("transposed tokens", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1))
    check("inner stride", lambda t: torch.stack([t, t + 1], dim=-1)[..., 0])
    check("offset", lambda t: torch.cat([t[..., :1], t], dim=-1)[..., 1:])


@pytest.mark.parametrize("length", [None, 6], ids=["per sample", "per token"])
def test_chunk_views(cpu, length):
    x, branch = randn(2, 6, 40, seed=1), randn(2, 6, 40, seed=2)
    views = modulation(2, 40, seed=3, parts=6, length=length)
    assert not views[1].is_contiguous()
    gate, scale, shift = views[0], views[2], views[5]
    expected = gated_residual_adaln(x, branch, *(view.clone() for view in (gate, scale, shift)), backend="cpu")
    actual = gated_residual_adaln(x, branch, gate, scale, shift, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_expanded_modulation(cpu):
    # Stride 0 over tokens; the gradient has the expanded shape, and autograd sums it.
    x, scale, shift = inputs("adaln", (2, 6, 40), seed=12)
    expected = adaln_layer_norm(x, scale, shift, backend="cpu")
    assert torch.equal(adaln_layer_norm(x, scale.expand(2, 6, 40), shift.expand(2, 6, 40), backend="cpu"), expected)
    leaf = scale.clone().requires_grad_()
    adaln_layer_norm(x, leaf.expand(2, 6, 40), shift, backend="cpu").square().sum().backward()
    direct = scale.clone().requires_grad_()
    adaln_layer_norm(x, direct, shift, backend="cpu").square().sum().backward()
    torch.testing.assert_close(leaf.grad, direct.grad)


def test_expanded_gradient(cpu):
    # sum().backward() passes a gradient whose strides are all 0.
    x, scale, shift = (tensor.requires_grad_() for tensor in inputs("adaln", (2, 6, 40), seed=13))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, scale, shift)]
    exact = torch.autograd.grad(adaln_layer_norm(*wide).sum(), wide)
    ours = torch.autograd.grad(adaln_layer_norm(x, scale, shift, backend="cpu").sum(), (x, scale, shift))
    with stated_order():
        plain = torch.autograd.grad(adaln_layer_norm(x, scale, shift, backend="reference").sum(), (x, scale, shift))
    for gradients in zip(ours, plain, exact, strict=True):
        assert_accurate(*gradients)


EMPTY = pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])


@EMPTY
@pytest.mark.parametrize("op", OPS)
def test_empty(op, shape):
    tensors = inputs(op, shape, seed=1, forms=("(1,1,C)", "(B,1,C)", "(B,L,C)"))
    result = values_and_gradients(op, tensors, "auto")
    for name, tensor in zip(ARGUMENTS[op], tensors, strict=True):
        assert result[f"d{name}"].shape == tensor.shape and not result[f"d{name}"].any()
    assert result["output 0"].shape == shape


@EMPTY
def test_empty_raw_ops(cpu, shape):
    assert_gradients_of_empty_inputs(torch.ops.var_kernels, shape)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("op", OPS)
def test_nan_and_inf_stay_in_their_row(cpu, op, bad):
    tensors = inputs(op, (2, 5, 40), seed=14)
    clean = outputs(op, tensors, "cpu")[-1]
    tensors[0][1, 3, 17] = bad
    y = outputs(op, tensors, "cpu")[-1]
    assert y[1, 3].isnan().all()
    assert torch.equal(y.nan_to_num(0), clean.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(0.0)))


@pytest.mark.parametrize("channels", [2304, 2310], ids=["whole cache lines", "rows not aligned"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("op", OPS)
def test_large_outputs_equal_small_ones(cpu, op, dtype, channels):
    # Tensors of more than 24 MiB in all are stored past the caches if their rows are whole cache lines; a slice of the
    # tokens is too small for that. Rows do not depend on each other, so that the values must be the same.
    length = 24 * 2**20 // (2 * channels * dtype.itemsize) + 1
    tensors = inputs(op, (1, length, channels), seed=17, dtype=dtype)
    large = values_and_gradients(op, tensors, "cpu")
    part = slice(length - 7, length)
    small = outputs(op, [tensor[:, part] if tensor.shape[1] > 1 else tensor for tensor in tensors], "cpu")
    for i, value in enumerate(small):
        assert torch.equal(large[f"output {i}"][:, part], value)
    assert all(value.isfinite().all() for value in large.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_writes_every_element(cpu, op, dtype):
    tensors = inputs(op, (2, 50, 35), seed=15, dtype=dtype, forms=("(B,L,C)", "(B,1,C)", "(1,1,C)"))
    expected = values_and_gradients(op, tensors, "cpu")
    poison()
    for name, value in values_and_gradients(op, tensors, "cpu").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("op", OPS)
def test_bit_equal_for_any_number_of_threads(cpu, op, restore_threads):
    tensors = inputs(op, (2, 130, 260), seed=16)  # twice as large as the limit up to which one thread does all
    results = []
    for count in (1, 2, 3, 4, 1):
        torch.set_num_threads(count)
        results.append(values_and_gradients(op, tensors, "cpu"))
        assert all(torch.equal(value, results[0][name]) for name, value in results[-1].items()), count


# ---- arguments -----------------------------------------------------------------------------------------------------

X = (2, 3, 6)
WRONG = [
    ("x", lambda t: t["x"][0], ValueError, "x: expected 3 dimensions"),
    ("x", lambda t: t["x"].int(), TypeError, "x: expected float32"),
    ("x", lambda t: [1.0], TypeError, "x: expected a torch.Tensor, got list"),
    ("scale", lambda t: torch.zeros(6), ValueError, r"scale: expected shape \(2, 6\)"),
    ("scale", lambda t: torch.zeros(3, 6), ValueError, r"scale: expected shape .* got \(3, 6\)"),
    ("shift", lambda t: torch.zeros(1, 3, 6), ValueError, r"shift: expected shape .* got \(1, 3, 6\)"),
    # These shapes have as many elements as (2, 1, 6) and (2, 3, 6): the number of elements must not decide.
    ("scale", lambda t: torch.zeros(1, 2, 6), ValueError, r"scale: expected shape .* got \(1, 2, 6\)"),
    ("shift", lambda t: torch.zeros(3, 2, 6), ValueError, r"shift: expected shape .* got \(3, 2, 6\)"),
    ("scale", lambda t: t["scale"].bfloat16(), TypeError, "scale: expected torch.float32 like x, got torch.bfloat16"),
    ("shift", lambda t: t["shift"].double(), TypeError, "shift: expected torch.float32 like x"),
    ("shift", lambda t: t["shift"].to("meta"), ValueError, "shift: expected device cpu like x, got meta"),
    ("eps", lambda t: -1e-6, ValueError, "eps: expected a number that is not negative"),
    ("eps", lambda t: float("nan"), ValueError, "eps: expected a number that is not negative"),
    ("backend", lambda t: "gpu", ValueError, "backend: expected one of auto, cpu, cuda, triton, reference, got 'gpu'"),
]
WRONG_GATED = [
    ("branch", lambda t: t["x"][:, :2], ValueError, r"branch: expected shape \(2, 3, 6\) like x"),
    ("branch", lambda t: t["x"][0], ValueError, "branch: expected 3 dimensions"),
    ("branch", lambda t: t["x"].double(), TypeError, "branch: expected torch.float32 or torch.bfloat16 or"),
    ("gate", lambda t: torch.zeros(6, 2), ValueError, r"gate: expected shape .* got \(6, 2\)"),
]


@pytest.mark.parametrize(
    "op, argument, make, error, message",
    [(op, *case) for op in OPS for case in WRONG] + [("gated", *case) for case in WRONG_GATED],
)
def test_wrong_arguments(op, argument, make, error, message):
    arguments = dict(zip(ARGUMENTS[op], inputs(op, X, seed=1), strict=True))
    with pytest.raises(error, match=message):
        OPS[op](**arguments | {argument: make(arguments)})


def test_cpu_backend_refuses_float64(cpu):
    tensors = inputs("adaln", X, seed=1, dtype=torch.float64)
    assert adaln_layer_norm(*tensors).dtype == torch.float64
    with pytest.raises(ValueError, match="'cpu' cannot serve adaln_layer_norm .*expected one of auto, reference"):
        adaln_layer_norm(*tensors, backend="cpu")


def test_raw_op_checks_its_arguments(cpu):
    assert_raw_op_checks(torch.ops.var_kernels._adaln_layer_norm)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_autocast_converts_to_the_dtype_of_x(backend):
    x, branch, gate, scale, shift = inputs("gated", X, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        residual, y = gated_residual_adaln(
            x, branch.bfloat16(), gate.bfloat16(), scale.bfloat16(), shift, backend=backend
        )
    assert residual.dtype == y.dtype == torch.float32
    rounded = [tensor.bfloat16().float() for tensor in (branch, gate, scale)]
    expected = gated_residual_adaln(x, *rounded, shift, backend=backend)
    assert torch.equal(residual, expected[0]) and torch.equal(y, expected[1])


# ---- torch's tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forms", [("(B,1,C)",) * 3, ("(1,1,C)", "(B,L,C)", "(B,1,C)")], ids=str)
def test_opcheck(cpu, forms):
    ops, check = torch.ops.var_kernels, torch.library.opcheck
    x, branch, gate, scale, shift = inputs("gated", (2, 5, 20), seed=1, dtype=torch.bfloat16, forms=forms)
    shift_varies = (shift.shape[0] != 1, shift.shape[1] != 1)
    y, mean, rstd = ops._adaln_layer_norm(x, scale, shift, 1e-6)
    check(ops._adaln_layer_norm.default, (x, scale, shift, 1e-6))
    check(ops._adaln_layer_norm_backward.default, (y, x, scale, mean, rstd, *shift_varies))
    check(ops._gated_residual_adaln.default, (x, branch, gate, scale, shift, 1e-6))
    for dresidual, dy in ((x, y), (None, y), (x, None)):
        arguments = (dresidual, dy, x, branch, gate, scale, mean, rstd, *shift_varies)
        check(ops._gated_residual_adaln_backward.default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_compile(cpu, op):
    assert_compiles(op, "auto")


@pytest.mark.parametrize("op", OPS)
def test_export(cpu, op):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return outputs(op, tensors, "auto")

    tensors = tuple(inputs(op, (2, 5, 20), seed=1))
    exported = torch.export.export(Module(), tensors)
    assert any("var_kernels" in str(node.target) for node in exported.graph.nodes)
    expected = outputs(op, tensors, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(exported.module()(*tensors), expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(cpu):
    x, scale, shift = randn(3, 2, 5, 20, seed=1), randn(3, 2, 20, seed=2), randn(1, 1, 20, seed=3)
    expected = torch.stack([adaln_layer_norm(x[i], scale[i], shift, backend="cpu") for i in range(3)])
    assert torch.equal(torch.vmap(adaln_layer_norm, (0, 0, None))(x, scale, shift), expected)
    # The mapped dimension is the innermost one, so that no row is dense.
    assert torch.equal(torch.vmap(adaln_layer_norm, (3, 0, None))(x.movedim(0, -1), scale, shift), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS)
def test_func_grad(cpu, op):
    tensors = inputs(op, (2, 5, 20), seed=1)

    def loss(*args):
        return sum(out.square().sum() for out in outputs(op, args, "cpu"))

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    numbers = tuple(range(len(tensors)))
    actual = torch.func.grad(loss, argnums=numbers)(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    batched = torch.vmap(torch.func.grad(loss, argnums=numbers))(*(torch.stack([t, 2 * t]) for t in tensors))
    assert all(torch.equal(a[0], b) for a, b in zip(batched, expected, strict=True))


def test_second_derivatives_and_forward_mode_are_refused(cpu):
    x, scale, shift = inputs("adaln", X, seed=1)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(adaln_layer_norm(leaf, scale, shift).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda tensor: adaln_layer_norm(tensor, scale, shift), (x,), (x,))
