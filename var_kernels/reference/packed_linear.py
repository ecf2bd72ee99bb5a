"""A linear layer with an optional GELU: the specification."""

import torch
import torch.nn.functional as F


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool) -> torch.Tensor:
    """x·Wᵀ + b in the dtype of x, or with `gelu` the GELU of that, in its tanh form.

    PyTorch sums in fp32 at least. No operand is widened, because generation on GPUs uses this function, and their
    matrix units take 16-bit numbers as they are.
    """
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y
