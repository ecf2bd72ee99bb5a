"""`apply` replaces the code of modules that our ops serve; its report says which, and takes it back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import NamedTuple

from torch import nn

from . import diffusers, infinity, var, vector_quantize
from .structure import LEFT, Target, replaced

TARGETS: tuple[Target, ...] = (*var.TARGETS, *infinity.TARGETS, *diffusers.TARGETS, *vector_quantize.TARGETS)


class Swapped(NamedTuple):
    """A module that was swapped: its path in the model, its class, and what it was recognised as."""

    path: str
    cls: str
    target: str


class Skipped(NamedTuple):
    """A module that was recognised and left as it is, and why."""

    path: str
    cls: str
    reason: str


@dataclass
class Report:
    """What `apply` did to a model."""

    swapped: list[Swapped] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _places: list[tuple[str, nn.Module, Target]] = field(default_factory=list, repr=False)

    @property
    def left_to_the_original(self) -> dict[tuple[str, str], int]:
        """How many calls a swapped module has left to its own code so far, by (path, reason)."""
        counts: Counter[tuple[str, str]] = Counter()
        for path, module, _ in self._places:
            for reason, count in vars(module).get(LEFT, {}).items():
                counts[path, reason] = count
        return dict(counts)

    def revert(self) -> None:
        """Gives every swapped module its own code back. A second call does nothing.

        A module whose method was wrapped since the swap, for example by a hook of accelerate, keeps the wrapper and our
        code in it, with a warning. It has its own code after the wrapper is removed and `revert` is called again.
        """
        wrapped = []
        for place in self._places:
            path, module, target = place
            own = vars(module)
            for name, function in target.replacements.items():
                if getattr(own.get(name), "__func__", None) is function:
                    del own[name]
            if any(replaced(module, name) for name in target.replacements):
                wrapped.append(place)
            else:
                own.pop(LEFT, None)
        self._places[:] = wrapped
        if wrapped:
            paths = ", ".join(path or type(module).__name__ for path, module, _ in wrapped)
            warnings.warn(
                f"revert: expected our methods, got some that were wrapped since the swap, in {paths}", stacklevel=2
            )

    def __str__(self) -> str:
        rows = [(path, cls, f"swapped: {target}") for path, cls, target in self.swapped]
        rows += [(path, cls, f"left: {reason}") for path, cls, reason in self.skipped]
        rows += [
            (path, "", f"{count} calls by its own code: {reason}")
            for (path, reason), count in self.left_to_the_original.items()
        ]
        if not rows:
            return "nothing to swap: no module has the structure of a class that our ops serve"
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{path:{widths[0]}}  {cls:{widths[1]}}  {what}" for path, cls, what in _grouped(rows))


def _grouped(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Rows that differ only in one number of their path become one row."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for path, cls, what in rows:
        pattern = ".".join("*" if part.isdigit() else part for part in path.split("."))
        groups.setdefault((pattern, cls, what), []).append(path)
    return [
        (paths[0] if len(paths) == 1 else f"{pattern} ({len(paths)})", cls, what)
        for (pattern, cls, what), paths in groups.items()
    ]


def _modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules inside, and those that a module keeps out of its state dict, in a tuple or a dict.

    VAR keeps its VQVAE so, and Infinity the attention of each schedule.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    waiting = [("", module)]
    while waiting:
        start, root = waiting.pop(0)
        for name, inner in root.named_modules():
            path = f"{start}.{name}".strip(".")
            if id(inner) in found:
                continue
            found[id(inner)] = (path, inner)
            for attribute, value in vars(inner).items():
                items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
                waiting += [
                    (f"{path}.{attribute}[{i}]".strip("."), item)
                    for i, item in enumerate(items) if isinstance(item, nn.Module) and attribute != "_modules"
                ]  # fmt: skip
    return list(found.values())


def apply(
    module: nn.Module, *, attention: bool = True, adaln: bool = True, quantizer: bool = True, strict: bool = False
) -> Report:
    """Replaces the code of the modules in `module` that our ops serve, and nothing else of them.

    A module is recognised by its attributes, the signatures of its methods and the names in their code, not by where it
    is imported from. The methods of instances are replaced: parameters, buffers, state dict, hooks, `train`, `to`,
    `copy.deepcopy` and wrappers such as DDP stay what they are, and a copy is swapped like its original. A pickle holds
    the model without the swap.

    What our ops can't serve exactly stays as it is: whole modules, which `report.skipped` lists with the reason, and
    single calls, such as those with attention dropout, which `report.left_to_the_original` counts.

    Args:
        module: the model, or a part of it.
        attention, adaln, quantizer: which parts are swapped.
        strict: raise if nothing is swapped or a module is skipped, instead of a warning or a line of the report.

    Returns:
        Report: `print(report)` shows it; `report.revert()` takes everything back. If the model was swapped before, the
        report lists the same modules.

    Raises:
        TypeError: if `module` is not a module.
        ValueError: with `strict`, see above; the model is then unchanged.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    parts = [part for part, wanted in (("attention", attention), ("adaln", adaln), ("quantizer", quantizer)) if wanted]
    report, new = Report(), Report()
    # Inner modules come first, because what is done to a model may depend on its blocks.
    for path, inner in reversed(_modules(module)):
        for target in TARGETS:
            if target.part not in parts or not target.matches(inner):
                continue
            if not target.is_swapped(inner):
                if reason := target.refusal_of(inner):
                    report.skipped.insert(0, Skipped(path, type(inner).__name__, reason))
                    continue
                for name, function in target.replacements.items():
                    vars(inner)[name] = MethodType(function, inner)
                new._places.append((path, inner, target))
            report.swapped.insert(0, Swapped(path, type(inner).__name__, target.name))
            report._places.insert(0, (path, inner, target))
    if strict and (report.skipped or not report.swapped):
        new.revert()
        raise ValueError(f"module: expected one of which every known part can be swapped\n{report}")
    if not report.swapped:
        warnings.warn(f"swap.apply, {type(module).__name__}: {report}", stacklevel=2)
    return report


@contextmanager
def applied(module: nn.Module, **options) -> Iterator[Report]:
    """`apply(module, **options)` inside a `with` block, and `revert` at its end."""
    report = apply(module, **options)
    try:
        yield report
    finally:
        report.revert()
