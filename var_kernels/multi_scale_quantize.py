"""Multi-scale residual quantizer of VAR: from a latent map to token maps of growing size, and back step by step."""

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ._checks import as_int, check, check_same, check_tensor
from .backends import resolve
from .native.library import autocast_dtype, define, needs_grad, raw_ops, register_fake
from .reference import multi_scale_quantize as _reference
from .reference.multi_scale_quantize import phi_index

__all__ = ["MultiScaleQuantized", "multi_scale_quantize", "next_scale_input", "phi_index"]

# errors is (B, K): the sum of the squares of f_hat_k - f. All maps are row-major. Scale k has the size
# (heights[k], widths[k]) and the convolution phi_index[k].
define(
    "_multi_scale_quantize(Tensor f, Tensor codebook, Tensor phi_weight, Tensor phi_bias, SymInt[] heights, "
    "SymInt[] widths, int[] phi_index, float phi_ratio, bool cosine) -> (Tensor tokens, Tensor f_hat, Tensor errors)",
    __name__,
)
# The gradients of E = sum(derrors * errors): for df every f_hat_k is constant, for the others f is constant.
define(
    "_multi_scale_quantize_backward(Tensor f, Tensor codebook, Tensor phi_weight, Tensor phi_bias, Tensor tokens, "
    "Tensor derrors, SymInt[] heights, SymInt[] widths, int[] phi_index, float phi_ratio) "
    "-> (Tensor df, Tensor dcodebook, Tensor dphi_weight, Tensor dphi_bias)",
    __name__,
)
# One scale of size (height, width) with the convolution phi_index. next_height is 0 if there is no next scale.
define(
    "_next_scale_input(Tensor f_hat, Tensor codes, Tensor phi_weight, Tensor phi_bias, int phi_index, "
    "SymInt height, SymInt width, SymInt next_height, SymInt next_width, float phi_ratio) "
    "-> (Tensor new_f_hat, Tensor next_map)",
    __name__,
)


@register_fake("_multi_scale_quantize")
def _(f, codebook, phi_weight, phi_bias, heights, widths, phi_index, phi_ratio, cosine):
    length = sum(height * width for height, width in zip(heights, widths, strict=True))
    tokens = f.new_empty((f.shape[0], length), dtype=torch.int64)
    return tokens, f.new_empty(f.shape), f.new_empty((f.shape[0], len(heights)))


@register_fake("_multi_scale_quantize_backward")
def _(f, codebook, phi_weight, phi_bias, tokens, derrors, heights, widths, phi_index, phi_ratio):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (f, codebook, phi_weight, phi_bias))


@register_fake("_next_scale_input")
def _(f_hat, codes, phi_weight, phi_bias, phi_index, height, width, next_height, next_width, phi_ratio):
    batch, channels = f_hat.shape[:2]
    return f_hat.new_empty(f_hat.shape), f_hat.new_empty((batch, next_height * next_width, channels))


class MultiScaleQuantized(NamedTuple):
    """The result of `multi_scale_quantize`, which describes the fields."""

    tokens: torch.Tensor
    f_hat: torch.Tensor
    vq_loss: torch.Tensor


class _Plan(NamedTuple):
    """A schedule of maps: the sizes, and the index of the convolution, with one entry per scale."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]
    phi_index: tuple[int, ...]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return list(zip(self.heights, self.widths, strict=True))


def _map_size(size: object) -> tuple[int, int]:
    sides = (size, size) if not isinstance(size, Sequence) else size
    try:
        height, width = (as_int(side) for side in sides)
    except (TypeError, ValueError):
        raise ValueError(f"patch_nums: expected integers or (height, width) pairs, got {size!r}") from None
    check(height >= 1 and width >= 1, "patch_nums", "sides of at least 1", size)
    return height, width


@lru_cache(maxsize=256)
def _cached_plan(sizes: tuple[int | tuple[int, int], ...], num_phi: int) -> _Plan:
    heights, widths = zip(*(_map_size(size) for size in sizes), strict=True)
    return _Plan(heights, widths, tuple(phi_index(k, len(sizes), num_phi) for k in range(len(sizes))))


def _plan(patch_nums: Sequence[int | tuple[int, int]], map_of: str, full: tuple[int, int], num_phi: int) -> _Plan:
    if not isinstance(patch_nums, Sequence) or isinstance(patch_nums, str):
        raise TypeError(f"patch_nums: expected a sequence of map sizes, got {type(patch_nums).__name__}")
    check(len(patch_nums) >= 1, "patch_nums", "at least one scale", "none")
    # Everything but plain ints is normalised before the look-up, because 2.0 and True compare equal to valid keys.
    key = tuple([size if type(size) is int else _map_size(size) for size in patch_nums])
    make = _cached_plan.__wrapped__ if torch.compiler.is_compiling() else _cached_plan  # the tracer warns about caches
    plan = make(key, num_phi)
    last = (plan.heights[-1], plan.widths[-1])
    if last != full:
        raise ValueError(f"patch_nums: expected the last map to be {full}, the size of {map_of}, got {last}")
    return plan


def _check_map(argument: str, shape: torch.Size) -> None:
    if 0 in shape[1:]:
        raise ValueError(f"{argument}: expected non-empty channels, height and width, got shape {tuple(shape)}")


def _check_phi(phi_weight: torch.Tensor, phi_bias: torch.Tensor, channels: int) -> None:
    check_tensor("phi_weight", phi_weight, rank=5)
    check_tensor("phi_bias", phi_bias, rank=2)
    num_phi = phi_weight.shape[0]
    if num_phi == 0 or phi_weight.shape != (num_phi, channels, channels, 3, 3):
        expected = f"(n, {channels}, {channels}, 3, 3) with n >= 1"
        raise ValueError(f"phi_weight: expected shape {expected}, got {tuple(phi_weight.shape)}")
    if phi_bias.shape != (num_phi, channels):
        raise ValueError(f"phi_bias: expected shape {(num_phi, channels)}, got {tuple(phi_bias.shape)}")


def _upcast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in float32; those in float64, which the reference takes, stay as they are."""
    return tuple(t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors)


class _Quantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(f, codebook, phi_weight, phi_bias, plan, phi_ratio, cosine, beta, backend):
        tokens, f_hat, errors = raw_ops(backend)._multi_scale_quantize(
            f, codebook, phi_weight, phi_bias, *plan, phi_ratio, cosine
        )
        return tokens, f_hat, errors.sum() * ((1 + beta) / (errors.shape[-1] * f.numel()))

    @staticmethod
    def setup_context(ctx, inputs, output):
        f, codebook, phi_weight, phi_bias, ctx.plan, ctx.phi_ratio, _, ctx.beta, ctx.backend = inputs
        ctx.save_for_backward(f, codebook, phi_weight, phi_bias, output[0])
        ctx.mark_non_differentiable(output[0])

    @staticmethod
    def backward(ctx, _, df_hat, dloss):
        f, codebook, phi_weight, phi_bias, tokens = ctx.saved_tensors
        scales = len(ctx.plan.heights)
        derrors = (dloss / (scales * f.numel())).expand(f.shape[0], scales)
        df, dcodebook, dphi_weight, dphi_bias = raw_ops(ctx.backend)._multi_scale_quantize_backward(
            f, codebook, phi_weight, phi_bias, tokens, derrors, *ctx.plan, ctx.phi_ratio
        )
        return df_hat + ctx.beta * df, dcodebook, dphi_weight, dphi_bias, None, None, None, None, None


def multi_scale_quantize(
    f: torch.Tensor,
    codebook: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    patch_nums: Sequence[int | tuple[int, int]],
    *,
    phi_ratio: float = 0.5,
    metric: str = "l2",
    beta: float = 0.25,
    backend: str = "auto",
) -> MultiScaleQuantized:
    """Quantizes a latent map into K token maps of growing size (algorithm 1 of arXiv 2404.02905).

    Start with f_hat = 0 and rest = f. For each scale k of map size (h_k, w_k)::

        tokens_k = nearest_code(area_pool(rest, (h_k, w_k)), codebook)
        u        = bicubic(codebook[tokens_k], (H, W))
        h        = (1 - phi_ratio) * u + phi_ratio * (conv3x3(u, phi_weight[i]) + phi_bias[i]),  i = phi_index(k, K, n)
        f_hat   += h
        rest    -= h

    ``vq_loss`` is the mean over scales of ``beta * mse(sg(f_hat_k), f) + mse(f_hat_k, sg(f))``, where sg stops the
    gradient and f_hat_k is f_hat after scale k.

    Args:
        f: (B, C, H, W), the encoder's output; any strides.
        codebook: (V, C).
        phi_weight, phi_bias: (n, C, C, 3, 3) and (n, C), the n convolutions that the scales share.
        patch_nums: the K map sizes, ints for square maps or (height, width) pairs; the last must be (H, W).
        phi_ratio: weight of the convolution in phi.
        metric: "l2" or "cosine", as in `nearest_code`; ties go to the lowest index.
        beta: weight of the commitment part of the loss.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Returns:
        MultiScaleQuantized: ``tokens`` (B, L) int64, scale after scale, row-major within a scale; ``f_hat``
        (B, C, H, W) in f's dtype, NaN where f is not finite; ``vq_loss``, a float32 scalar (float64 for float64),
        zero for an empty batch.

    Gradients: f_hat is straight-through, so its gradient goes to f unchanged and nowhere else. The gradient of vq_loss
    goes to f (commitment part) and to codebook, phi_weight and phi_bias (codebook part, in which f_hat_k depends on all
    scales up to k).

    The tensors share one dtype: float32, bfloat16, float16, or float64 (reference only). The arithmetic is float32 for
    the 16-bit types as well. Under autocast dtypes may be mixed; the tensors are then cast to float32 (float64 stays),
    and f_hat is float32.

    Raises:
        TypeError: for an argument that is not a tensor, an unsupported dtype, or mixed dtypes outside autocast.
        ValueError: for a wrong rank, shape or device, or an invalid patch_nums, metric or backend.

    Source: Tian et al., Visual Autoregressive Modeling, arXiv 2404.02905.
    """
    check_tensor("f", f, rank=4)
    check_tensor("codebook", codebook, rank=2)
    batch, channels, height, width = f.shape
    _check_map("f", f.shape)
    if codebook.shape[0] == 0 or codebook.shape[1] != channels:
        raise ValueError(f"codebook: expected shape (V, {channels}) with V >= 1, got {tuple(codebook.shape)}")
    _check_phi(phi_weight, phi_bias, channels)
    plan = _plan(patch_nums, "f", (height, width), phi_weight.shape[0])
    check(metric in ("l2", "cosine"), "metric", "'l2' or 'cosine'", repr(metric))
    tensors = (f, codebook, phi_weight, phi_bias)
    if autocast_dtype(f.device.type) is not None:
        f, codebook, phi_weight, phi_bias = tensors = _upcast(*tensors)
    check_same("f", f, codebook=codebook, phi_weight=phi_weight, phi_bias=phi_bias)
    chosen = resolve("multi_scale_quantize", backend, f.device.type, f.dtype)
    if batch == 0:
        tokens = f.new_empty((0, sum(map(operator.mul, plan.heights, plan.widths))), dtype=torch.int64)
        return MultiScaleQuantized(tokens, f.clone(), sum(tensor.sum() * 0 for tensor in _upcast(*tensors)))
    if chosen == "reference":
        with torch.autocast(f.device.type, enabled=False):
            return MultiScaleQuantized(*_reference.multi_scale_quantize(
                *tensors, plan.sizes, phi_ratio=phi_ratio, metric=metric, beta=beta
            ))
    quantize = _Quantize.apply if needs_grad(*tensors) else _Quantize.forward
    tokens, f_hat, vq_loss = quantize(*_upcast(*tensors), plan, phi_ratio, metric == "cosine", beta, chosen)
    return MultiScaleQuantized(tokens, f_hat.to(f.dtype), vq_loss)


def next_scale_input(
    f_hat: torch.Tensor,
    codes: torch.Tensor,
    phi_weight: torch.Tensor,
    phi_bias: torch.Tensor,
    patch_nums: Sequence[int | tuple[int, int]],
    k: int,
    *,
    phi_ratio: float = 0.5,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds scale k to f_hat and pools the sum to the size of scale k+1 (one step of algorithm 2 of arXiv 2404.02905).

    ``new = f_hat + phi_k(bicubic(codes))`` with phi_k as in `multi_scale_quantize`; the second result is
    ``area_pool(new, (h_{k+1}, w_{k+1}))`` with one row per pixel, from which the transformer's input for scale k+1 is
    made. Sampling and teacher forcing use this op; the results carry no gradient, and f_hat is not modified.

    Args:
        f_hat: (B, C, H, W), the sum of the scales before k, zeros for k = 0; any strides.
        codes: (B, h_k·w_k, C), embeddings of scale k, row-major: rows of the codebook, or mixtures of them.
        phi_weight, phi_bias: (n, C, C, 3, 3) and (n, C), all n shared convolutions.
        patch_nums: the K map sizes, ints for square maps or (height, width) pairs; the last must be (H, W).
        k: the scale, from 0.
        phi_ratio: weight of the convolution in phi.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Returns:
        The new f_hat (B, C, H, W), and the next map (B, h_{k+1}·w_{k+1}, C), or None after the last scale; both in
        f_hat's dtype.

    The dtypes are those of `multi_scale_quantize`: one for all tensors except under autocast, arithmetic in float32.

    Raises:
        TypeError: for an argument that is not a tensor, an unsupported dtype, or mixed dtypes outside autocast.
        ValueError: for a wrong rank, shape or device, an invalid patch_nums or backend, or a k out of range.

    Source: Tian et al., Visual Autoregressive Modeling, arXiv 2404.02905.
    """
    check_tensor("f_hat", f_hat, rank=4)
    check_tensor("codes", codes, rank=3)
    batch, channels, height, width = f_hat.shape
    _check_map("f_hat", f_hat.shape)
    _check_phi(phi_weight, phi_bias, channels)
    plan = _plan(patch_nums, "f_hat", (height, width), phi_weight.shape[0])
    heights, widths, phi_indices = plan
    if not isinstance(k, int) or not 0 <= k < len(heights):
        raise ValueError(f"k: expected a scale from 0 to {len(heights) - 1}, got {k}")
    if codes.shape != (batch, heights[k] * widths[k], channels):
        expected = (batch, heights[k] * widths[k], channels)
        raise ValueError(f"codes: expected shape {expected}, got {tuple(codes.shape)}")
    device = f_hat.device.type
    if autocast_dtype(device) is not None:
        f_hat, codes, phi_weight, phi_bias = _upcast(f_hat, codes, phi_weight, phi_bias)
    check_same("f_hat", f_hat, codes=codes, phi_weight=phi_weight, phi_bias=phi_bias)
    dtype = f_hat.dtype
    backend = resolve("multi_scale_quantize", backend, device, dtype)
    if backend == "reference":
        with torch.autocast(device, enabled=False):
            return _reference.next_scale_input(f_hat, codes, phi_weight, phi_bias, plan.sizes, k, phi_ratio=phi_ratio)
    if dtype != torch.float32:
        f_hat, codes, phi_weight, phi_bias = _upcast(f_hat, codes, phi_weight, phi_bias)
    if needs_grad(f_hat, codes, phi_weight, phi_bias):
        f_hat, codes, phi_weight, phi_bias = f_hat.detach(), codes.detach(), phi_weight.detach(), phi_bias.detach()
    last = k + 1 == len(heights)
    next_height, next_width = (0, 0) if last else (heights[k + 1], widths[k + 1])
    new_f_hat, next_map = raw_ops(backend)._next_scale_input(
        f_hat, codes, phi_weight, phi_bias, phi_indices[k], heights[k], widths[k], next_height, next_width, phi_ratio
    )
    if dtype != torch.float32:
        new_f_hat, next_map = new_f_hat.to(dtype), next_map.to(dtype)
    return new_f_hat, None if last else next_map
