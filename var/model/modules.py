"""Says whether a module may be computed from its parameters, or has to be called."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is a `kind` that nothing was added to, so that its parameters say what a call computes.

    Such a module may be part of a fused computation. Any other one has to be called: a subclass, a parametrised or
    quantised layer, an adapter around a layer, a module with hooks, one whose `forward` was replaced, or one whose
    parameters are of a tensor subclass.
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not _has_any_global_hook()
        and all(type(p) in (nn.Parameter, Tensor) for p in module._parameters.values() if p is not None)
    )


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of the module's first floating-point parameter; float32 if it has none, as a quantised layer."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers that change how it is computed, but not what: `torch.compile` and checkpointing."""
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        while name in module._modules:
            module = module._modules[name]
    return module
