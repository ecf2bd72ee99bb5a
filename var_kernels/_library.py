"""The operator library `torch.ops.var_kernels`: schemas are defined in Python, so that no compiler is needed to import."""

import torch
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
    return torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The active autocast dtype on this device, None outside autocast."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
