"""The specification of every op: plain torch, on any device, differentiable; the kernels are judged by it."""
