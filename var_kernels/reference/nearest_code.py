"""Nearest codebook entry: the specification."""

import torch
from torch.nn.functional import normalize

_SCORES_AT_ONCE = 1 << 20  # rows are processed in chunks, so that memory does not grow with N·V


def nearest_code(z: torch.Tensor, codebook: torch.Tensor, *, metric: str = "l2") -> torch.Tensor:
    """The index of the code with the largest score: `z·c - |c|²/2` for "l2", `z·c/|c|` for "cosine".

    Of equal scores the lowest index counts. A score that is NaN or -inf is never chosen, and a row without any other
    score gets index 0.
    """
    # Scores are fp64, because no setting (TF32, bf16 matmul on CPU, autocast) lowers its precision. MPS has fp32 only.
    wide = torch.float32 if z.device.type == "mps" else torch.float64
    codes = codebook.detach().to(wide)
    if metric == "cosine":
        codes = normalize(codes, dim=-1, eps=1e-12)
        bias = codes.new_zeros(codes.shape[0])
    else:
        bias = -0.5 * codes.square().sum(-1)
    rows = z.detach().reshape(-1, z.shape[-1])
    best = rows.new_empty(rows.shape[0], dtype=torch.int64)
    chunk = max(1, _SCORES_AT_ONCE // codes.shape[0])
    # Results are written in place: small tensors kept between the large temporaries would fragment the heap.
    for rows_chunk, best_chunk in zip(rows.split(chunk), best.split(chunk), strict=True):
        scores = torch.addmm(bias, rows_chunk.to(wide), codes.T)
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        best_chunk.copy_(scores.argmax(-1))  # the first of equal values
    return best.reshape(z.shape[:-1])
