"""The operator library `torch.ops.var_kernels`. Schemas are defined in Python: importing needs no compiler."""

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("var_kernels", "DEF")


def define(schema: str) -> None:
    """Define one raw operator; the native library implements it per device, the op's page adds the fake kernel."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def register_fake(name: str):
    """Decorator: the shape function of the raw operator `name`."""
    return torch.library.register_fake(f"var_kernels::{name}", lib=LIBRARY)


def needs_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd has to see this call."""
    # In forward mode no tensor says requires_grad. The autograd.Function refuses it; a raw op would give zero tangents.
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    # Nor does a tensor under vmap, whatever is wrapped in it: a raw op would silently cut the gradient. Compiled code
    # may contain a vmap as well, and pays nothing for the autograd.Function.
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None:
        return True
    return any([tensor.requires_grad for tensor in tensors])


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The active autocast dtype on this device, None outside autocast."""
    if device_type == "meta":  # knows no autocast, and asking would raise
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
