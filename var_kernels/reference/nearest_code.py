"""Nearest codebook entry: the specification."""

import torch
from torch.nn.functional import normalize

CENTRE_CODES = 32  # the codes from which the centre is computed
_SCORES_AT_ONCE = 1 << 20  # rows are processed in chunks, so that memory does not grow with N·V


def centre_of(codes: torch.Tensor) -> torch.Tensor:
    """A point (C,) near the codes (V, C). Distances stay the same if it is subtracted from codes and vectors, while the
    scores become as small as the distances, and so do their rounding errors.

    It is computed from 32 codes, spread evenly over the codebook. In each channel it is the middle between the least
    and the greatest finite element of these codes, if it is farther from 0 than they are apart; else it is 0. So in a
    codebook around 0 nothing is subtracted, and elements that are multiples of one number, which make exact ties, stay
    multiples of its half.
    """
    some = codes[torch.arange(CENTRE_CODES, device=codes.device) * codes.shape[0] // CENTRE_CODES]
    low = some.where(some.isfinite(), torch.inf).amin(0)
    high = some.where(some.isfinite(), -torch.inf).amax(0)
    middle = 0.5 * low + 0.5 * high
    return middle.where(middle.abs() > high - low, 0)


def nearest_code(z: torch.Tensor, codebook: torch.Tensor, *, metric: str = "l2") -> torch.Tensor:
    """The index of the code with the largest score: `z·c/|c|` for "cosine", and for "l2" `z·c - |c|²/2`, where z and c
    are counted from the centre of the codes.

    Of equal scores the lowest index counts. A score that is NaN or -inf is never chosen, and a row without any other
    score gets index 0.
    """
    # Scores are fp64, because no setting (TF32, bf16 matmul on CPU, autocast) lowers its precision. MPS has fp32 only.
    wide = torch.float32 if z.device.type == "mps" else torch.float64
    codes = codebook.detach().to(wide)
    if metric == "cosine":
        codes = normalize(codes, dim=-1, eps=1e-12)
        bias = codes.new_zeros(codes.shape[0])
        centre = None
    else:
        centre = centre_of(codes)
        codes = codes - centre
        bias = -0.5 * codes.square().sum(-1)
    rows = z.detach().reshape(-1, z.shape[-1])
    best = rows.new_empty(rows.shape[0], dtype=torch.int64)
    chunk = max(1, _SCORES_AT_ONCE // codes.shape[0])
    # Results are written in place: small tensors kept between the large temporaries would fragment the heap.
    for rows_chunk, best_chunk in zip(rows.split(chunk), best.split(chunk), strict=True):
        wide_rows = rows_chunk.to(wide)
        scores = torch.addmm(bias, wide_rows if centre is None else wide_rows - centre, codes.T)
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        best_chunk.copy_(scores.argmax(-1))  # the first of equal values
    return best.reshape(z.shape[:-1])
