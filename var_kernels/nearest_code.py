"""Nearest codebook entry: the quantisation step of a VQ tokenizer, without the N×V matrix of distances."""

import torch

from ._checks import check, check_tensor
from ._library import autocast_dtype, define, raw_ops, register_fake
from .backends import resolve
from .reference import nearest_code as _reference

define("_nearest_code(Tensor z, Tensor codebook, bool cosine) -> Tensor", __name__)
_METRICS = ("l2", "cosine")


@register_fake("_nearest_code")
def _(z, codebook, cosine):
    return z.new_empty(z.shape[:1], dtype=torch.int64)


def nearest_code(z: torch.Tensor, codebook: torch.Tensor, *, metric: str = "l2", backend: str = "auto") -> torch.Tensor:
    """The index of the codebook entry nearest to each vector.

    "l2":     argmin over v of |z - codebook[v]|², computed as argmax of z·c - |c|²/2: |z|² is common to all codes.
    "cosine": argmax over v of z·c / max(|c|, 1e-12). The length of z does not change the result, so z need not be
              normalised.

    Args:
        z: (…, C), float32, bfloat16 or float16 (float64 is served by the reference).
        codebook: (V, C) with V >= 1, the dtype of z. Under autocast the two may differ and are widened, which is
            exact.
        metric: "l2" or "cosine".
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Returns:
        int64 indices of shape (…). Of codes with equal scores the lowest index is returned. 16-bit inputs are widened
        exactly; scores are fp32 whatever the matmul precision settings (never TF32), in the reference fp64. A code
        whose score is NaN or -inf is never chosen, and a row without any other code, such as one with a NaN, gets 0.

    There is no gradient: the result is an integer. Memory is O(N + V·C), never O(N·V).

    Raises:
        TypeError: for an argument that is not a tensor, or of an unsupported or different dtype.
        ValueError: for a wrong shape, device, metric or backend.

    Source: the quantiser of VQ-VAE (van den Oord et al., arXiv 1711.00937); "cosine" as in ViT-VQGAN
    (arXiv 2110.04627) and in VAR with `using_znorm`.
    """
    check_tensor("z", z)
    check_tensor("codebook", codebook, rank=2)
    check(z.dim() >= 1, "z", "at least 1 dimension", f"shape {tuple(z.shape)}")
    check(codebook.shape[0] >= 1, "codebook", "at least one code", f"shape {tuple(codebook.shape)}")
    if z.shape[-1] != codebook.shape[1]:
        raise ValueError(f"codebook: expected shape (V, {z.shape[-1]}) for z of shape {tuple(z.shape)}, "
                         f"got {tuple(codebook.shape)}")  # fmt: skip
    check(metric in _METRICS, "metric", "'l2' or 'cosine'", repr(metric))
    if z.dtype != codebook.dtype:
        if autocast_dtype(z.device.type) is None:
            raise TypeError(f"codebook: expected {z.dtype} like z, got {codebook.dtype}")
        wide = torch.promote_types(z.dtype, codebook.dtype)
        z, codebook = z.to(wide), codebook.to(wide)
    check(z.device == codebook.device, "codebook", f"device {z.device} like z", codebook.device)
    if z.numel() == 0:
        return z.new_zeros(z.shape[:-1], dtype=torch.int64)
    backend = resolve("nearest_code", backend, z.device.type, z.dtype)
    if backend == "reference":
        return _reference.nearest_code(z, codebook, metric=metric)
    nearest = raw_ops(backend)._nearest_code
    if z.dim() == 2:
        return nearest(z, codebook, metric == "cosine")
    return nearest(z.reshape(-1, z.shape[-1]), codebook, metric == "cosine").reshape(z.shape[:-1])
