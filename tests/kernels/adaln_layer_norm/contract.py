"""What the tests of every backend of AdaLN share: inputs, the results of the reference, and comparisons with them."""

import pytest
import torch

from var_kernels import adaln_layer_norm, gated_residual_adaln
from var_kernels.testing import assert_accurate, poison, randn, stated_order

OPS = {"adaln": adaln_layer_norm, "gated": gated_residual_adaln}
ARGUMENTS = {"adaln": ("x", "scale", "shift"), "gated": ("x", "branch", "gate", "scale", "shift")}
FORMS = ("(B,C)", "(B,1,C)", "(1,1,C)", "(B,L,C)")


def shape_of(form: str, batch: int, length: int, channels: int) -> tuple[int, ...]:
    sizes = {"B": batch, "L": length, "C": channels, "1": 1}
    return tuple(sizes[name] for name in form.strip("()").split(","))


def inputs(op: str, shape, *, seed: int, dtype=torch.float32, forms=("(B,1,C)",) * 3) -> list[torch.Tensor]:
    """Inputs of `op`. The means of gate, scale and shift differ and are not 0: none can be ignored or swapped."""
    batch, length, channels = shape
    forms = dict(zip(("gate", "scale", "shift"), forms, strict=True))

    def draw(i, argument):
        if argument not in forms:
            return randn(*shape, seed=seed + i, dtype=dtype)
        size = shape_of(forms[argument], batch, length, channels)
        return (randn(*size, seed=seed + i, dtype=torch.float64, std=0.5) + 0.3 * i).to(dtype)

    return [draw(i, argument) for i, argument in enumerate(ARGUMENTS[op])]


def outputs(op: str, tensors, backend: str) -> tuple[torch.Tensor, ...]:
    result = OPS[op](*tensors, backend=backend)
    return result if op == "gated" else (result,)


def values_and_gradients(op: str, tensors, backend: str, use=(True, True), upstream=None) -> dict[str, torch.Tensor]:
    """The outputs, and the gradients of the inputs. The outputs in `use` get fixed gradients, rounded to `upstream`."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    results = outputs(op, tensors, backend)
    chosen = [result for result, used in zip(results[::-1], use, strict=False) if used]
    dtype = upstream or tensors[0].dtype
    douts = [randn(*out.shape, seed=90 + i).to(dtype).to(out.dtype) for i, out in enumerate(chosen)]
    gradients = torch.autograd.grad(chosen, tensors, douts, allow_unused=True)
    named = {f"output {i}": result for i, result in enumerate(results)}
    return named | {f"d{name}": grad for name, grad in zip(ARGUMENTS[op], gradients, strict=True)}


def assert_accurate_results(actual, op: str, tensors, *, may_vanish: bool = False, **options) -> None:
    """`actual`, the `values_and_gradients` of a kernel, is as accurate as the reference in the same dtype."""
    with stated_order():
        same_dtype = values_and_gradients(op, tensors, "reference", **options)
    exact = values_and_gradients(op, [t.double() for t in tensors], "reference", upstream=tensors[0].dtype, **options)
    for name, value in actual.items():
        if same_dtype[name] is None:
            assert value is None or not value.any(), f"{name}: expected no gradient"
        else:
            assert_accurate(value, same_dtype[name], exact[name], name=name, may_vanish=may_vanish)


def rotated_forms(index: int) -> list[str]:
    """A form of modulation each for gate, scale and shift."""
    return [FORMS[(index + offset) % 4] for offset in (0, 1, 3)]


def mixed_inputs(shape, dtype, seed=1, forms=("(B,1,C)",) * 3) -> list[torch.Tensor]:
    x, branch, *rest = inputs("gated", shape, seed=seed, forms=forms)
    return [x, branch.to(dtype), *rest]


def assert_accurate_mixed(found, tensors) -> None:
    """`found`, the results of a kernel for these tensors, has the right dtypes and is as accurate as the reference."""
    assert [tensor.dtype for tensor in found] == [torch.float32, tensors[1].dtype]
    exact = gated_residual_adaln(*(tensor.double() for tensor in tensors))
    with stated_order():
        plain = gated_residual_adaln(*tensors, backend="reference")
    for name, *values in zip(("residual", "y"), found, plain, exact, strict=True):
        assert_accurate(*values, name=name)


def assert_raw_op_checks(op) -> None:
    """`op`, a raw _adaln_layer_norm, refuses wrong arguments by itself, not only behind the public function."""
    x, scale, shift = inputs("adaln", (2, 3, 6), seed=1)
    with pytest.raises(RuntimeError, match="scale: expected Float, got Half"):
        op(x, scale.half(), shift, 1e-6)
    with pytest.raises(RuntimeError, match=r"shift: expected shape \(B, 1, C\)"):
        op(x, scale, torch.zeros(1, 3, 6), 1e-6)
    with pytest.raises(RuntimeError, match="x: expected float32, bfloat16 or float16"):
        op(x.double(), scale.double(), shift.double(), 1e-6)


def assert_gradients_of_empty_inputs(ops, shape) -> None:
    """The raw `ops` give gradients of the inputs' shapes, and zeros where modulation is broadcast over nothing."""
    x, branch, gate, scale, shift = inputs("gated", shape, seed=1, forms=("(1,1,C)", "(B,1,C)", "(B,L,C)"))
    residual, y, mean, rstd = ops._gated_residual_adaln(x, branch, gate, scale, shift, 1e-6)
    poison()
    gradients = ops._gated_residual_adaln_backward(y, None, residual, branch, gate, scale, mean, rstd, False, False)
    assert [tuple(g.shape) for g in gradients] == [shape, shape, (1, 1, shape[2]), scale.shape, (1, 1, shape[2])]
    assert not any(gradient.any() for gradient in gradients)


def assert_compiles(op: str, backend: str) -> None:
    """torch.compile gives the bits of the eager op, forward and backward, for three lengths."""
    compiled = torch.compile(lambda *tensors: outputs(op, tensors, backend), fullgraph=True, backend="aot_eager")
    for length in (5, 9, 6):  # The second call makes the length symbolic.
        tensors = [tensor.requires_grad_() for tensor in inputs(op, (2, length, 20), seed=1)]
        expected, actual = outputs(op, tensors, backend), compiled(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        gradients = [torch.autograd.grad([out.square().sum() for out in o], tensors) for o in (actual, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
