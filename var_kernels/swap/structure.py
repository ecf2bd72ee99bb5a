"""Recognising the classes of other repositories by their structure: attributes, signatures, and names in their code.

Import paths don't count, so a copy of a class in another repository is recognised too. A copy that computes something
else is not: its code then uses other names, or assigns its variables in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType

from torch import nn


@dataclass(frozen=True)
class Method:
    """What is known of a method of a foreign class.

    `parameters` are its names after `self`, `names` all attributes and globals that its code may use, of which it uses
    the `required` ones, and `variables` local variables that it assigns in this order.
    """

    parameters: tuple[str, ...]
    names: frozenset[str]
    variables: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()

    def difference(self, name: str, function: object) -> str | None:
        """Why `function`, the method `name` of a class, is not this method; None if it is."""
        code = getattr(function, "__code__", None)
        if not isinstance(code, CodeType):
            return f"its {name} is not a Python function"
        found = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        if found != self.parameters:
            return f"its {name} takes ({', '.join(found)}), expected ({', '.join(self.parameters)})"
        names = set(_names(code))
        if unknown := sorted(names - self.names):
            return f"its {name} uses {', '.join(unknown)}, which the known one does not"
        if unused := sorted(self.required - names):
            return f"its {name} does not use {', '.join(unused)}, which the known one does"
        if missing := [variable for variable in self.variables if variable not in code.co_varnames]:
            return f"its {name} has no variable {missing[0]}"
        if self.variables != tuple(variable for variable in code.co_varnames if variable in self.variables):
            return f"its {name} assigns {', '.join(self.variables)} in another order"
        return None


def known(parameters: str, names: str, variables: str = "") -> Method:
    """The `Method` of these names, which spaces separate. Its code may do without some of `names`."""
    return Method(tuple(parameters.split()), frozenset(names.split()), tuple(variables.split()))


def exactly(parameters: str, names: str, variables: str = "", optional: str = "") -> Method:
    """The `Method` of these names, which spaces separate. Its code uses all `names`, and perhaps the optional ones."""
    required = frozenset(names.split())
    return Method(tuple(parameters.split()), required | set(optional.split()), tuple(variables.split()), required)


def _names(code: CodeType) -> Iterator[str]:
    """Names of attributes and globals in `code` and in the functions and comprehensions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


# The attribute of a swapped module that counts the calls left to its own code, by reason. It is an ordinary dict, so
# that a pickle of the model can be loaded where this package is not installed.
LEFT = "_calls_left_to_the_original"


def count_as_left(module: nn.Module, reason: str) -> None:
    """Counts a call that `module` leaves to its own code because of `reason`, which the report shows."""
    counts = vars(module).setdefault(LEFT, {})
    counts[reason] = counts.get(reason, 0) + 1


def left_to_the_original(module: nn.Module, method: str, reason: str, *args, **kwargs):
    """Calls the method that `module` had before the swap, because of `reason`, which the report shows."""
    count_as_left(module, reason)
    return getattr(type(module), method)(module, *args, **kwargs)


def replaced(module: nn.Module, name: str) -> bool:
    """Whether `module` has another method `name` than its class."""
    own = vars(module).get(name)
    return own is not None and getattr(own, "__func__", own) is not getattr(type(module), name)


def must_be_called(module: nn.Module) -> bool:
    """Whether a call of the module is more than the forward of its class."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or replaced(module, "forward")


def hooks_of(module: nn.Module, name: str) -> str | None:
    """Why `module` can't do without calling its module `name`, None if it can."""
    return f"{name} has hooks, which would not be called" if must_be_called(getattr(module, name)) else None


def _is_layer_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm


def layer_norm_difference(
    module: nn.Module, name: str, is_layer_norm: Callable[[nn.Module], bool] = _is_layer_norm
) -> str | None:
    """Why our ops can't stand for the module `name` of `module`, None if it is a LayerNorm without weights or hooks."""
    norm = getattr(module, name)
    if not is_layer_norm(norm) or norm.elementwise_affine or len(norm.normalized_shape) != 1:
        return f"{name}: expected an nn.LayerNorm over the channels without weights, got {norm}"
    return hooks_of(module, name)


@dataclass(frozen=True)
class Target:
    """A class of another repository that `apply` swaps.

    `part` is the option of `apply` that includes it. A module with all `attributes`, none of the `others`, and of which
    `condition` holds, is one of this class, and its `methods` must be the known ones. `refusal` says why one of them is
    not swapped nevertheless. `replacements` maps names of methods to our functions.
    """

    name: str
    part: str
    attributes: tuple[str, ...]
    methods: Mapping[str, Method]
    replacements: Mapping[str, FunctionType]
    refusal: Callable[[nn.Module], str | None] = lambda module: None
    others: tuple[str, ...] = ()
    condition: Callable[[nn.Module], bool] = lambda module: True
    versions: str = ""

    def __post_init__(self) -> None:
        # A pickle stores a bound method by its name, so that a loaded model has the method of its own class.
        for name, function in self.replacements.items():
            function.__name__ = name

    def matches(self, module: nn.Module) -> bool:
        """Whether the module has the attributes and methods of this class."""
        if type(module).__getattr__ is not nn.Module.__getattr__:
            return False  # a wrapper, such as those of torch.compile, FSDP and PEFT, has those of the module inside
        return (
            all(hasattr(module, name) for name in (*self.attributes, *self.methods))
            and not any(hasattr(module, name) for name in self.others)
            and self.condition(module)
        )

    def refusal_of(self, module: nn.Module) -> str | None:
        """Why a module that matches is not swapped, None if it is."""
        for name, method in self.methods.items():
            if replaced(module, name):
                return f"its {name} was replaced by other code"
            if difference := method.difference(name, getattr(type(module), name)):
                return f"{difference}; known: {self.versions}" if self.versions else difference
        return self.refusal(module)

    def is_swapped(self, module: nn.Module) -> bool:
        """Whether the module has our replacements already."""
        own = vars(module)
        return all(getattr(own.get(name), "__func__", None) is function for name, function in self.replacements.items())
