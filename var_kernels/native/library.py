"""The raw operators. Their schemas are defined in Python, so importing needs no compiler.

They exist twice, under the same names and schemas: in `torch.ops.var_kernels`, implemented for each device by the
native library, and in `torch.ops.var_kernels_triton`, implemented by Triton kernels. A second namespace is needed
because Triton and CUDA kernels serve the same devices.

A process may import two copies of this package, such as an installed one and one that a library of kernels has fetched.
The second copy uses the operators that the first has defined.
"""

import importlib
from collections.abc import Callable

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

NATIVE = torch.library.Library("var_kernels", "FRAGMENT")
TRITON = torch.library.Library("var_kernels_triton", "FRAGMENT")

# The namespace of each backend's operators.
NAMESPACES = {"cpu": NATIVE.ns, "cuda": NATIVE.ns, "triton": TRITON.ns}

_schemas: list[str] = []
_names: dict[str, list[str]] = {}  # the names of the raw operators, by the stem of the module that defines them
_fakes: dict[str, Callable] = {}
_of_another_copy: set[str] = set()


def define(schema: str, op_module: str) -> None:
    """Defines one raw operator, `_name(...) -> ...`, of the module `op_module` (its `__name__`).

    That module also registers the operator's shape function. The Triton implementation is the function `name` of the
    module with the same stem in `triton/`, which is imported at the first call.
    """
    stem = op_module.rpartition(".")[2]
    name = schema.partition("(")[0]
    _schemas.append(schema)
    _names.setdefault(stem, []).append(name)
    if _has_another_copy(name, schema):
        _of_another_copy.add(name)
        return
    for library in (NATIVE, TRITON):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def in_triton(*args, **kwargs):
        module = importlib.import_module(f"..triton.{stem}", __package__)
        return getattr(module, name.removeprefix("_"))(*args, **kwargs)

    # backends.py chooses Triton for CPU tensors only if launches are handed to a function instead of a GPU.
    for key in ("CUDA", "CPU"):
        TRITON.impl(name, in_triton, key)


def _has_another_copy(name: str, schema: str) -> bool:
    """Whether another copy of this package has defined the operator; ImportError if it has another schema there."""
    for found in torch._C._jit_get_schemas_for_operator(f"{NATIVE.ns}::{name}"):
        if found != torch._C.parse_schema(f"{NATIVE.ns}::{schema}"):
            raise ImportError(
                f"{__name__}: expected no other release of var_kernels in this process, found one whose operator is "
                f"{found}"
            )
        return True
    return False


def register_fake(name: str):
    """A decorator that registers the shape function of the raw operator `name`."""

    def register(function):
        _fakes[name] = function
        if name in _of_another_copy:
            return function
        for library in (NATIVE, TRITON):
            torch.library.register_fake(f"{library.ns}::{name}", function, lib=library)
        return function

    return register


def names(stem: str) -> tuple[str, ...]:
    """The names of the raw operators that the module with this stem defines."""
    return tuple(_names[stem])


def define_again(namespace: str) -> torch.library.Library:
    """Defines the same operators in another namespace, in which the caller implements them.

    They exist as long as the returned library does.
    """
    library = torch.library.Library(namespace, "DEF")
    for schema in _schemas:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for name, function in _fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", function, lib=library)
    return library


def raw_ops(backend: str):
    """The namespace with the raw operators of a backend that `resolve` chose."""
    return getattr(torch.ops, NAMESPACES[backend])


def needs_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd has to see this call."""
    # In forward mode no tensor has requires_grad. The autograd.Function refuses forward mode, whereas a raw op would
    # give zero tangents.
    if forward_ad._current_level >= 0:
        return True
    if not torch.is_grad_enabled():
        return False
    # A tensor under vmap does not show the requires_grad of the tensor that it wraps, so a raw op would cut the
    # gradient without an error. Compiled code may contain a vmap as well, and the autograd.Function costs it nothing.
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None:
        return True
    return any([tensor.requires_grad for tensor in tensors])


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The active autocast dtype on this type of device; None outside autocast."""
    if device_type == "meta":  # it has no autocast, and the queries below would raise
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
