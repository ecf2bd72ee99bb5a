"""x + gate * branch, the end of a block, with the gradients of branch and gate in one pass."""

from __future__ import annotations

import torch
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ..backends import resolve
from ..native.library import needs_grad, raw_ops


class _GatedSum(torch.autograd.Function):
    # Without a setup_context, whose arguments PyTorch would bind for 60 µs at each call.
    @staticmethod
    def forward(ctx, x, branch, gate, backend):
        ctx.backend = backend
        ctx.save_for_backward(branch, gate)
        return torch.addcmul(x, branch, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        branch, gate = ctx.saved_tensors
        # That of the gated norm, whose norm has no gradient here: of its inputs the kernel reads a row of zeros.
        zeros = grad.new_zeros((1, 1, grad.shape[2]))
        mean = grad.new_zeros(grad.shape[:2], dtype=torch.float32)
        _, dbranch, dgate, _, _ = raw_ops(ctx.backend)._gated_residual_adaln_backward(
            grad, None, zeros.expand(grad.shape), branch, gate, zeros, mean, mean, False, False
        )
        return grad, dbranch, dgate, None


def are_ordinary(*tensors: torch.Tensor) -> bool:
    """Whether these are no subclasses of tensors such as DTensor, for which our ops have no rules."""
    return all([type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors])


def gated_sum(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + gate * branch for tensors that PyTorch can broadcast, computed in fp32 and rounded once to the widest dtype.

    In PyTorch, the product and its two gradients are tensors like x that are written and read again.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), gate.dtype)
    x, branch, gate = x.to(dtype), branch.to(dtype), gate.to(dtype)
    if (
        x.dim() == 3
        and x.numel() > 0
        and x.shape == branch.shape
        and gate.shape in ((x.shape[0], 1, x.shape[2]), (1, 1, x.shape[2]))
        and are_ordinary(x, branch, gate)
        and _functorch.peek_interpreter_stack() is None  # torch.func needs a setup_context
        and forward_ad._current_level < 0
        and needs_grad(x, branch, gate)
    ):
        backend = resolve("gated_residual_adaln", "auto", x.device.type, x.dtype)
        if backend != "reference":
            return _GatedSum.apply(x, branch, gate, backend)
    return torch.addcmul(x, branch, gate)
