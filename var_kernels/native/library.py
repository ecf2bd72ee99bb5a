"""The raw operators. Schemas are defined in Python: importing needs no compiler.

They exist twice, under the same names and schemas: in `torch.ops.var_kernels`, implemented per device by the native
library, and in `torch.ops.var_kernels_triton`, implemented by Triton kernels, which share devices with CUDA kernels.
"""

import importlib
from collections.abc import Callable

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

NATIVE = torch.library.Library("var_kernels", "DEF")
TRITON = torch.library.Library("var_kernels_triton", "DEF")

# The namespace that serves each backend.
NAMESPACES = {"cpu": NATIVE.ns, "cuda": NATIVE.ns, "triton": TRITON.ns}

_schemas: list[str] = []
_names: dict[str, list[str]] = {}  # of the raw operators, by the stem of the page that defines them
_fakes: dict[str, Callable] = {}


def define(schema: str, page: str) -> None:
    """Define one raw operator, `_name(...) -> ...`, of the op's page (its `__name__`), which adds the fake kernel.

    Its Triton implementation is the function `name` of the page's module in `triton/`, imported at the first call.
    """
    stem = page.rpartition(".")[2]
    _schemas.append(schema)
    for library in (NATIVE, TRITON):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    _names.setdefault(stem, []).append(name)

    def in_triton(*args, **kwargs):
        module = importlib.import_module(f"var_kernels.triton.{stem}")
        return getattr(module, name.removeprefix("_"))(*args, **kwargs)

    for key in ("CUDA", "CPU"):  # on CPU tensors only where launches do not go to a GPU: backends.py sees to it
        TRITON.impl(name, in_triton, key)


def register_fake(name: str):
    """Decorator: the shape function of the raw operator `name`."""

    def register(function):
        _fakes[name] = function
        for library in (NATIVE, TRITON):
            torch.library.register_fake(f"{library.ns}::{name}", function, lib=library)
        return function

    return register


def names(stem: str) -> tuple[str, ...]:
    """The raw operators that the page `stem` defines."""
    return tuple(_names[stem])


def define_again(namespace: str) -> torch.library.Library:
    """The same operators in one more namespace, for whoever implements them; they last as long as what is returned."""
    library = torch.library.Library(namespace, "DEF")
    for schema in _schemas:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, function in _fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", function, lib=library)
    return library


def raw_ops(backend: str):
    """The raw operators of a backend that `resolve` chose."""
    return getattr(torch.ops, NAMESPACES[backend])


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
