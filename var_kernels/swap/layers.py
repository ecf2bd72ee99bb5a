"""The swapped forwards as layers for the `kernels` package of Hugging Face: classes with a `forward` and nothing else.

`kernelize` puts the forward of a layer in the place of that of a module of the model, whose attributes it then uses.
"""

from __future__ import annotations

from torch import nn

from . import var


def _layer(name: str, forward, replaces: str) -> type[nn.Module]:
    return type(
        name, (nn.Module,),
        {"forward": forward, "has_backward": True, "can_torch_compile": False, "__module__": __name__,
         "__doc__": f"The forward of {replaces} on the ops of var_kernels."},
    )  # fmt: skip


VarSelfAttention = _layer("VarSelfAttention", var.ATTENTION.replacements["forward"], "VAR's SelfAttention")
VarAdaLNSelfAttn = _layer("VarAdaLNSelfAttn", var.BLOCK.replacements["forward"], "VAR's AdaLNSelfAttn")
VarAdaLNBeforeHead = _layer("VarAdaLNBeforeHead", var.HEAD.replacements["forward"], "VAR's AdaLNBeforeHead")

__all__ = ["VarAdaLNBeforeHead", "VarAdaLNSelfAttn", "VarSelfAttention"]
