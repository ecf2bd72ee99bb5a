"""A check of every op against its reference, small enough to run at any time: ``python -m var_kernels`` prints it.

Each op runs on random inputs: forward and, if it has gradients, backward. :func:`var_kernels.testing.assert_accurate`
compares the results with the float64 reference; the error that plain PyTorch makes in the same dtype sets the bound.
Token indices must equal those of the reference, or name codes that are as near within that bound.
"""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from . import (
    PackedConv3x3,
    PackedLinear,
    adaln_layer_norm,
    backends,
    block_causal_attention,
    gated_residual_adaln,
    group_norm_silu,
    multi_scale_quantize,
    nearest_code,
    next_scale_input,
    qk_norm_cache,
    sample_tokens,
)
from .testing import assert_accurate, attention_inputs, max_error, modulation, randn, stated_order

DTYPES = (torch.float32, torch.bfloat16)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class CheckResult:
    """The check of one op on one backend, device and dtype.

    `error` is the largest absolute difference from float64, `failure` says why the check failed (None if it passed),
    and `backward` whether gradients were part of it.
    """

    op: str
    backend: str
    device: str
    dtype: torch.dtype
    backward: bool
    error: float
    failure: str | None


def run() -> Iterator[CheckResult]:
    """Checks every op on each device with each of its backends, or with the reference if there is no other."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op in backends.OPS:
            for dtype in DTYPES:
                serving = [name for name in backends.BACKENDS
                           if backends.unavailable_reason(name, device, op, dtype) is None]  # fmt: skip
                for backend in [name for name in serving if name != "reference"] or serving:
                    yield _check(op, backend, device, dtype)


def _check(op: str, backend: str, device: str, dtype: torch.dtype) -> CheckResult:
    call, inputs = CASES[op]()
    rounded = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    wide = {name: tensor.double() for name, tensor in rounded.items()}
    backward, error, failure = False, 0.0, None
    try:
        exact = _outputs_and_gradients(call, wide, dtype, "reference")
        with stated_order():
            same_dtype = _outputs_and_gradients(call, rounded, dtype, "reference")
        actual = _outputs_and_gradients(call, rounded, dtype, backend)
        backward = any(name.startswith("gradient") for name in exact)
        for name, tensor in actual.items():
            if tensor.is_floating_point():
                error = max(error, max_error(tensor, exact[name]))
                assert_accurate(tensor, same_dtype[name], exact[name], name=name)
            elif "z" in wide:
                _assert_as_near(tensor, exact[name], rounded["z"], rounded["codebook"])
            elif not torch.equal(tensor, exact[name]):
                different = int((tensor != exact[name]).sum())
                raise AssertionError(f"{name}: {different} of {tensor.numel()} indices differ from the reference")
    except Exception as problem:  # the failure of one op is reported, and the others are still checked
        failure = textwrap.shorten(f"{type(problem).__name__}: {problem}", 300)
    return CheckResult(op, backend, device, dtype, backward, error, failure)


def _outputs_and_gradients(call: Callable, inputs: Tensors, dtype: torch.dtype, backend: str) -> Tensors:
    """The outputs of `call` by name, and the gradient of each input.

    The gradients of the outputs that start the backward are fixed numbers, rounded to `dtype`.
    """
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = call(backend=backend, **leaves)
    roots = [tensor for tensor in outputs.values() if tensor.requires_grad]
    if not roots:
        return outputs
    cotangents = [
        randn(max(root.numel(), 1), seed=100 + i).to(dtype).to(root.device, root.dtype).view_as(root)
        for i, root in enumerate(roots)
    ]
    gradients = torch.autograd.grad(roots, list(leaves.values()), cotangents)
    named = {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: tensor.detach() for name, tensor in outputs.items()} | named


def _assert_as_near(actual: torch.Tensor, exact: torch.Tensor, z: torch.Tensor, codebook: torch.Tensor) -> None:
    """Raises AssertionError unless the chosen codes have the best scores, up to the error of scores in fp32.

    Two codes may be so close that this error decides between them.
    """
    scores, wide = (a @ b.mT - b.square().sum(-1) / 2 for a, b in ((z.float(), codebook.float()),
                                                                   (z.double(), codebook.double())))  # fmt: skip
    best = exact.unsqueeze(-1)
    chosen = wide.gather(-1, actual.unsqueeze(-1)).float()
    assert_accurate(chosen.flatten(), scores.gather(-1, best).flatten(), wide.gather(-1, best).flatten(), name="tokens")


# The sizes below cross the widths of tiles and vectors: lengths and channels are no multiples of 16. Heads are grouped,
# and the modulation is a `chunk` view with one row per sample; the gate has one row per token.


def _attention() -> tuple[Callable, Tensors]:
    q, k, v = attention_inputs(2, 4, 91, 72, kv_heads=2, seed=0)

    def call(q, k, v, backend):
        return {"out": block_causal_attention(q, k, v, (1, 4, 9, 16, 25, 36), backend=backend)}

    return call, {"q": q, "k": k, "v": v}


def _adaln() -> tuple[Callable, Tensors]:
    scale, shift = modulation(2, 203, seed=1, parts=2)

    def call(x, scale, shift, backend):
        return {"y": adaln_layer_norm(x, scale, shift, backend=backend)}

    return call, {"x": randn(2, 37, 203, seed=0), "scale": scale, "shift": shift}


def _gated() -> tuple[Callable, Tensors]:
    scale, shift = modulation(2, 203, seed=1, parts=2)
    x, branch, gate = (randn(2, 37, 203, seed=seed) for seed in (2, 3, 4))

    def call(x, branch, gate, scale, shift, backend):
        residual, y = gated_residual_adaln(x, branch, gate, scale, shift, backend=backend)
        return {"residual": residual, "y": y}

    return call, {"x": x, "branch": branch, "gate": gate, "scale": scale, "shift": shift}


def _nearest() -> tuple[Callable, Tensors]:
    def call(z, codebook, backend):
        return {"tokens": nearest_code(z.detach(), codebook.detach(), backend=backend)}

    return call, {"z": randn(61, 33, seed=0), "codebook": randn(517, 33, seed=1)}


def _quantize() -> tuple[Callable, Tensors]:
    patch_nums, channels = (1, 2, 3, 5), 12

    def call(f, codebook, phi_weight, phi_bias, backend):
        weights = (phi_weight, phi_bias, patch_nums)
        tokens, f_hat, vq_loss = multi_scale_quantize(f, codebook, *weights, backend=backend)
        codes = codebook.detach()[tokens[:, 1:5]]
        new_f_hat, next_map = next_scale_input(f.detach(), codes, *weights, 1, backend=backend)
        return {"tokens": tokens, "f_hat": f_hat, "vq_loss": vq_loss, "new_f_hat": new_f_hat, "next_map": next_map}

    inputs = {
        "f": randn(2, channels, 5, 5, seed=0),
        "codebook": randn(37, channels, seed=1),
        "phi_weight": randn(4, channels, channels, 3, 3, seed=2, std=0.1),
        "phi_bias": randn(4, channels, seed=3, std=0.1),
    }
    return call, inputs


def _qk_norm_cache() -> tuple[Callable, Tensors]:
    def call(qkv, q_factor, backend):
        k_cache, v_cache = (qkv.new_zeros(2, 3, 60, 40) for _ in range(2))
        factor = q_factor.detach().to(torch.promote_types(q_factor.dtype, torch.float32))
        q = qk_norm_cache(qkv.detach(), k_cache, v_cache, 7, q_factor=factor, backend=backend)
        return {"q": q, "k_cache": k_cache, "v_cache": v_cache}

    return call, {"qkv": randn(2, 37, 3, 3, 40, seed=0), "q_factor": randn(3, seed=1).exp()}


def _sample() -> tuple[Callable, Tensors]:
    def call(conditional, unconditional, backend):
        seeds = torch.arange(3, device=conditional.device)
        options = {"guidance": 1.5, "top_k": 90, "top_p": 0.9, "seeds": seeds, "offset": 5}
        # Rounding the logits may change a draw, so all precisions draw from the same logits, rounded to bf16.
        logits = [tensor.detach().bfloat16().to(tensor.dtype) for tensor in (conditional, unconditional)]
        return {"tokens": sample_tokens(*logits, **options, backend=backend)}

    inputs = {"conditional": 3 * randn(3, 11, 517, seed=0), "unconditional": 3 * randn(3, 11, 517, seed=1)}
    return call, inputs


def _linear() -> tuple[Callable, Tensors]:
    def call(x, weight, bias, backend):
        plain, activated = (PackedLinear(weight, bias, gelu=gelu, backend=backend) for gelu in (False, True))
        return {"y": plain(x.detach()), "activated": activated(x.detach())}

    return call, {"x": randn(9, 51, seed=0), "weight": randn(83, 51, seed=1, std=0.2), "bias": randn(83, seed=2)}


def _conv() -> tuple[Callable, Tensors]:
    def call(x, weight, bias, residual, backend):
        plain, doubling = (PackedConv3x3(weight, bias, doubling=doubled, backend=backend) for doubled in (False, True))
        return {"y": plain(x.detach(), residual.detach()), "doubled": doubling(x.detach())}

    inputs = {
        "x": randn(2, 37, 9, 14, seed=0),
        "weight": randn(83, 37, 3, 3, seed=1, std=0.05),
        "bias": randn(83, seed=2),
        "residual": randn(2, 83, 9, 14, seed=3),
    }
    return call, inputs


def _norm() -> tuple[Callable, Tensors]:
    def call(x, weight, bias, backend):
        weight, bias = (tensor.detach().to(torch.promote_types(x.dtype, torch.float32)) for tensor in (weight, bias))
        options = {"groups": 4, "backend": backend}
        return {"y": group_norm_silu(x.detach(), weight, bias, silu=False, **options),
                "activated": group_norm_silu(x.detach(), weight, bias, **options)}  # fmt: skip

    return call, {"x": randn(2, 36, 9, 14, seed=0), "weight": randn(36, seed=1), "bias": randn(36, seed=2)}


CASES: dict[str, Callable[[], tuple[Callable, Tensors]]] = {
    "block_causal_attention": _attention,
    "adaln_layer_norm": _adaln,
    "gated_residual_adaln": _gated,
    "nearest_code": _nearest,
    "multi_scale_quantize": _quantize,
    "qk_norm_cache": _qk_norm_cache,
    "sample_tokens": _sample,
    "packed_linear": _linear,
    "winograd_conv": _conv,
    "group_norm_silu": _norm,
}
