"""AdaLN-modulated LayerNorm, and the gated residual sum fused in front of it.

Next-scale transformers modulate each LayerNorm by a scale and a shift that depend on the condition, and gate each
branch before it joins the residual stream (AdaLN-zero). With framework calls the norm takes six passes over memory, and
gate, sum and norm take about ten; the kernels here need two and four.
"""

import torch
from torch.autograd.function import once_differentiable

from ._checks import check, check_same, check_tensor, same_floats
from .backends import resolve
from .native.library import autocast_dtype, define, needs_grad, raw_ops, register_fake
from .reference import adaln_layer_norm as _reference

_FLOAT32_BRANCHES = (torch.float32, torch.bfloat16, torch.float16)

# Raw ops take the modulation (scale, shift, gate) as 3-D views of shape (B or 1, L or 1, C). mean and rstd are (B, L)
# in fp32. The gradient of a modulation tensor has the shape of its view. The backward needs the shape of shift, not its
# values.
define(
    "_adaln_layer_norm(Tensor x, Tensor scale, Tensor shift, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    __name__,
)
define(
    "_adaln_layer_norm_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd, "
    "bool shift_per_sample, bool shift_per_token) -> (Tensor dx, Tensor dscale, Tensor dshift)",
    __name__,
)
define(
    "_gated_residual_adaln(Tensor x, Tensor branch, Tensor gate, Tensor scale, Tensor shift, float eps) "
    "-> (Tensor residual, Tensor y, Tensor mean, Tensor rstd)",
    __name__,
)
define(
    "_gated_residual_adaln_backward(Tensor? dresidual, Tensor? dy, Tensor residual, Tensor branch, Tensor gate, "
    "Tensor scale, Tensor mean, Tensor rstd, bool shift_per_sample, bool shift_per_token) "
    "-> (Tensor dx, Tensor dbranch, Tensor dgate, Tensor dscale, Tensor dshift)",
    __name__,
)


def _dense(like: torch.Tensor, shape=None) -> torch.Tensor:
    return like.new_empty(like.shape if shape is None else shape)


def _shift_shape(x: torch.Tensor, per_sample: bool, per_token: bool) -> tuple[int, int, int]:
    return (x.shape[0] if per_sample else 1, x.shape[1] if per_token else 1, x.shape[2])


@register_fake("_adaln_layer_norm")
def _(x, scale, shift, eps):
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return _dense(x), mean, torch.empty_like(mean)


@register_fake("_adaln_layer_norm_backward")
def _(dy, x, scale, mean, rstd, shift_per_sample, shift_per_token):
    return _dense(x), _dense(scale), _dense(x, _shift_shape(x, shift_per_sample, shift_per_token))


@register_fake("_gated_residual_adaln")
def _(x, branch, gate, scale, shift, eps):
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    return _dense(x), _dense(branch, x.shape), mean, torch.empty_like(mean)


@register_fake("_gated_residual_adaln_backward")
def _(dresidual, dy, residual, branch, gate, scale, mean, rstd, shift_per_sample, shift_per_token):
    dshift = _dense(residual, _shift_shape(residual, shift_per_sample, shift_per_token))
    return _dense(residual), _dense(branch), _dense(gate), _dense(scale), dshift


class _AdaLN(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale, shift, eps, backend):
        return raw_ops(backend)._adaln_layer_norm(x, scale, shift, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, scale, shift, _, ctx.backend = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.shift_varies = (shift.shape[0] != 1, shift.shape[1] != 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _dmean, _drstd):
        backward = raw_ops(ctx.backend)._adaln_layer_norm_backward
        return *backward(dy, *ctx.saved_tensors, *ctx.shift_varies), None, None


class _GatedResidualAdaLN(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, branch, gate, scale, shift, eps, backend):
        return raw_ops(backend)._gated_residual_adaln(x, branch, gate, scale, shift, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, branch, gate, scale, shift, _, ctx.backend = inputs
        residual, _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        # The last block of a network uses only one of the two outputs; the gradient of the other is then None.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(residual, branch, gate, scale, mean, rstd)
        ctx.shift_varies = (shift.shape[0] != 1, shift.shape[1] != 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dresidual, dy, _dmean, _drstd):
        if dresidual is None and dy is None:
            return (None,) * 7
        backward = raw_ops(ctx.backend)._gated_residual_adaln_backward
        return *backward(dresidual, dy, *ctx.saved_tensors, *ctx.shift_varies), None, None


def adaln_layer_norm(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> torch.Tensor:
    """LayerNorm over the last dimension without weights of its own, modulated by a condition.

    y[b,l,c] = (x[b,l,c] - mean) * rstd * (1 + scale[b,l,c]) + shift[b,l,c], where mean and variance are those of the
    C values x[b,l,:] (the variance is their mean squared distance from the mean) and rstd = 1 / sqrt(variance + eps).

    Args:
        x: (B, L, C), float32, bfloat16 or float16 (float64 is served by the reference); in Triton C up to 16384.
        scale, shift: each (B, C), (B, 1, C), (1, 1, C) or, one per token, (B, L, C), independently of each other.
            A view such as a `chunk` of a modulation tensor is read in place. Under autocast they are converted to
            the dtype of x; otherwise they must have it.
        eps: added to the variance; not negative.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Returns:
        (B, L, C), dense, in the dtype of x. Arithmetic and statistics are fp32 (fp64 for float64), and the result is
        rounded once.

    Differentiable once in x, scale and shift. Gradients of scale and shift are summed in fp32, in an order that depends
    only on the shape and, in Triton, on the model of the GPU: repeated runs are bit-equal, with any number of threads.
    A row of x with NaN or Inf gives a row of NaN.

    Raises:
        TypeError: for an argument that is not a tensor, or of an unsupported or different dtype.
        ValueError: for a wrong shape, device, eps or backend.

    Source: adaptive layer norm as in Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748),
    used by VAR (arXiv 2404.02905).
    """
    alike = same_floats(x, scale, shift)
    if not alike or x.dim() != 3:
        check_tensor("x", x, rank=3)
        check_tensor("scale", scale)
        check_tensor("shift", shift)
    scale = _modulation_view("scale", scale, x)
    shift = _modulation_view("shift", shift, x)
    check(eps >= 0, "eps", "a number that is not negative", eps)
    if not alike:
        if autocast_dtype(x.device.type) is not None:
            scale, shift = scale.to(x.dtype), shift.to(x.dtype)
        check_same("x", x, scale=scale, shift=shift)
    backend = resolve("adaln_layer_norm", backend, x.device.type, x.dtype)
    if x.numel() == 0 or backend == "reference":
        return _reference.adaln_layer_norm(x, scale, shift, eps=eps)
    if needs_grad(x, scale, shift):
        return _AdaLN.apply(x, scale, shift, eps, backend)[0]
    return raw_ops(backend)._adaln_layer_norm(x, scale, shift, eps)[0]


def gated_residual_adaln(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a gated branch to the residual stream, and normalises the sum for the next branch, in one pass.

    residual = x + gate * branch
    y = adaln_layer_norm(residual, scale, shift, eps=eps)

    The sum is computed in fp32 (fp64 for float64) and rounded to the dtype of x. The norm is taken of the rounded
    residual, so the result equals that of the two lines above.

    Args:
        x: (B, L, C), float32, bfloat16 or float16 (float64 is served by the reference).
        branch: (B, L, C) in the dtype of x. If x is float32, the branch may also be bfloat16 or float16, the result of
            a projection in that dtype.
        gate, scale, shift: each (B, C), (B, 1, C), (1, 1, C) or (B, L, C), as in `adaln_layer_norm`. Under autocast
            they and `branch` are converted to the dtype of x; otherwise they must have it.
        eps: added to the variance; not negative.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Returns:
        (residual, y), both (B, L, C) and dense: residual in the dtype of x, y in that of branch, which the next
        projection takes.

    Differentiable once in all five tensors (a branch of another dtype than x is converted before, y afterwards), and as
    deterministic as `adaln_layer_norm`.

    Raises:
        TypeError: for an argument that is not a tensor, or of an unsupported or different dtype.
        ValueError: for a wrong shape, device, eps or backend.

    Source: the gated residual branches (AdaLN-zero) of Peebles & Xie, "Scalable Diffusion Models with Transformers"
    (arXiv 2212.09748), as in VAR (arXiv 2404.02905).
    """
    alike = same_floats(x, branch, gate, scale, shift)
    if not alike or not x.dim() == branch.dim() == 3:
        check_tensor("x", x, rank=3)
        check_tensor("branch", branch, rank=3)
        for argument, modulation in (("gate", gate), ("scale", scale), ("shift", shift)):
            check_tensor(argument, modulation)
    if branch.shape != x.shape:
        raise ValueError(f"branch: expected shape {tuple(x.shape)} like x, got {tuple(branch.shape)}")
    gate = _modulation_view("gate", gate, x)
    scale = _modulation_view("scale", scale, x)
    shift = _modulation_view("shift", shift, x)
    check(eps >= 0, "eps", "a number that is not negative", eps)
    if not alike:
        if autocast_dtype(x.device.type) is not None:
            branch, gate, scale, shift = (tensor.to(x.dtype) for tensor in (branch, gate, scale, shift))
        check_same("x", x, gate=gate, scale=scale, shift=shift)
        if branch.dtype not in _branch_dtypes(x.dtype):
            allowed = " or ".join(str(dtype) for dtype in _branch_dtypes(x.dtype))
            raise TypeError(f"branch: expected {allowed} beside x in {x.dtype}, got {branch.dtype}")
        if branch.device != x.device:
            raise ValueError(f"branch: expected device {x.device} like x, got {branch.device}")
    backend = resolve("gated_residual_adaln", backend, x.device.type, x.dtype)
    if x.numel() == 0 or backend == "reference":
        return _reference.gated_residual_adaln(x, branch, gate, scale, shift, eps=eps)
    if needs_grad(x, branch, gate, scale, shift):
        residual, y = _GatedResidualAdaLN.apply(x, branch.to(x.dtype), gate, scale, shift, eps, backend)[:2]
        return residual, y.to(branch.dtype)
    return raw_ops(backend)._gated_residual_adaln(x, branch, gate, scale, shift, eps)[:2]


def _branch_dtypes(x: torch.dtype) -> tuple[torch.dtype, ...]:
    return _FLOAT32_BRANCHES if x == torch.float32 else (x,)


def _modulation_view(argument: str, modulation: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The modulation as a view of shape (B or 1, L or 1, C); ValueError unless its shape is one of the four allowed."""
    batch, length, channels = x.shape
    shape = modulation.shape
    if len(shape) == 3:
        samples, tokens, width = shape
        if width == channels and ((samples == batch and tokens in (1, length)) or samples == tokens == 1):
            return modulation
    elif shape == (batch, channels):
        return modulation.unsqueeze(1)
    raise ValueError(
        f"{argument}: expected shape {(batch, channels)}, {(batch, 1, channels)}, {(1, 1, channels)} or "
        f"{(batch, length, channels)} for x of shape {(batch, length, channels)}, got {tuple(shape)}"
    )
