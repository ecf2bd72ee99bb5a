"""Nearest codebook entry: the quantization step of a VQ tokenizer, without the N×V matrix of distances."""

import torch

from ._checks import check_tensor, same_floats
from .backends import resolve
from .native.library import autocast_dtype, define, raw_ops, register_fake
from .reference import nearest_code as _reference

define("_nearest_code(Tensor z, Tensor codebook, bool cosine) -> Tensor", __name__)
_METRICS = ("l2", "cosine")


@register_fake("_nearest_code")
def _(z, codebook, cosine):
    return z.new_empty(z.shape[:1], dtype=torch.int64)


def nearest_code(
    z: torch.Tensor,
    codebook: torch.Tensor,
    *,
    metric: str = "l2",
    return_hits: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The index of the codebook entry nearest to each vector.

    "l2":     argmin over v of |z - codebook[v]|², computed as argmax of z·c - |c|²/2, since |z|² is the same for all
              codes c. Here z and c are counted from the centre of the codebook, see below.
    "cosine": argmax over v of z·c / max(|c|, 1e-12). The length of z does not change the result, so z need not be
              normalised.

    Args:
        z: (…, C), float32, bfloat16 or float16 (float64 is served by the reference).
        codebook: (V, C) with V >= 1, in the dtype of z. Under autocast the two dtypes may differ and are widened, which
            is exact. With several codebooks (product or multi-head quantization) it is (G, V, C): z is then (…, G, C),
            and z[…, g, :] is searched in codebook[g].
        metric: "l2" or "cosine".
        return_hits: also return how often each code was chosen, to report the usage of codes or for an EMA update.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Returns:
        int64 indices, of the shape of z without C. Of codes with equal scores the lowest index is returned. 16-bit
        inputs are widened exactly; scores are fp32 whatever the matmul precision settings (never TF32), in the
        reference fp64. A code whose score is NaN or -inf is never chosen. A row that has no other code, for example a
        row with a NaN, gets index 0. With `return_hits` the result is a pair: the indices, and the int64 counts, of the
        shape of codebook without C.

    The centre is a point near the codes, from which distances are the same, but scores round less. In each channel it
    is the middle between the least and the greatest of 32 codes, spread evenly over the codebook, if it is farther from
    0 than they are apart, else 0. So codebooks around 0 are searched as they are. A code that is chosen is nearest up
    to the rounding of its score and that of the nearest code: |z - c|² exceeds the least by no more than
    4·γ·(|z'|·|c'| + |c'|²/2), with z' and c' counted from the centre, c' the longer of the two codes, and
    γ = (2C + 4)·2^-24 (2^-53 for float64).

    There is no gradient: the results are integers. Memory is O(N·C + V·C), never O(N·V).

    Raises:
        TypeError: for an argument that is not a tensor, or of an unsupported or different dtype.
        ValueError: for a wrong shape, device, metric or backend.

    Source: the quantizer of VQ-VAE (van den Oord et al., arXiv 1711.00937); "cosine" as in ViT-VQGAN
    (arXiv 2110.04627) and in VAR with `using_znorm`.
    """
    alike = same_floats(z, codebook)
    if not alike:
        check_tensor("z", z)
        check_tensor("codebook", codebook)
    shape, codes = z.shape, codebook.shape
    if len(codes) not in (2, 3):
        raise ValueError(f"codebook: expected 2 or 3 dimensions, got shape {tuple(codes)}")
    if len(shape) < len(codes) - 1:
        raise ValueError(f"z: expected at least {len(codes) - 1} dimensions, got shape {tuple(shape)}")
    if codes[-2] < 1:
        raise ValueError(f"codebook: expected at least one code, got shape {tuple(codes)}")
    groups = codes[:-2]
    if codes[-1] != shape[-1] or (groups and shape[-2] != groups[0]):
        expected = f"({shape[-2]}, V, {shape[-1]})" if groups else f"(V, {shape[-1]})"
        raise ValueError(f"codebook: expected shape {expected} for z of shape {tuple(shape)}, got {tuple(codes)}")
    if metric not in _METRICS:
        raise ValueError(f"metric: expected 'l2' or 'cosine', got {metric!r}")
    if not alike and z.dtype != codebook.dtype:
        if autocast_dtype(z.device.type) is None:
            raise TypeError(f"codebook: expected {z.dtype} like z, got {codebook.dtype}")
        wide = torch.promote_types(z.dtype, codebook.dtype)
        z, codebook = z.to(wide), codebook.to(wide)
    if not alike and z.device != codebook.device:
        raise ValueError(f"codebook: expected device {z.device} like z, got {codebook.device}")
    if z.numel() == 0:
        nearest = z.new_zeros(z.shape[:-1], dtype=torch.int64)
    else:
        backend = resolve("nearest_code", backend, z.device.type, z.dtype)
        if not groups:
            nearest = _search(z, codebook, metric, backend)
        else:
            pairs = zip(z.unbind(-2), codebook.unbind(0), strict=True)
            nearest = torch.stack([_search(part, codes, metric, backend) for part, codes in pairs], dim=-1)
    return (nearest, _count(nearest, codebook)) if return_hits else nearest


def _search(z: torch.Tensor, codebook: torch.Tensor, metric: str, backend: str) -> torch.Tensor:
    """The indices of the nearest codes of one codebook (V, C) for z (…, C)."""
    if backend == "reference":
        return _reference.nearest_code(z, codebook, metric=metric)
    search = raw_ops(backend)._nearest_code
    if z.dim() == 2:
        return search(z, codebook, metric == "cosine")
    return search(z.reshape(-1, z.shape[-1]), codebook, metric == "cosine").reshape(z.shape[:-1])


def _count(nearest: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """How often each code of each codebook occurs in `nearest`. torch.bincount would make the host wait for a GPU."""
    codes = codebook.shape[-2]
    if codebook.dim() == 3:
        nearest = nearest + torch.arange(codebook.shape[0], device=nearest.device) * codes
    chosen = nearest.reshape(-1)
    hits = chosen.new_zeros(codebook.shape[:-1].numel())
    return hits.scatter_add_(0, chosen, torch.ones_like(chosen)).reshape(codebook.shape[:-1])
