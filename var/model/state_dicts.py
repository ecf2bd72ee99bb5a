"""Finds the weights of a model among the contents of a checkpoint.

A training saves more than weights (its step, options, the state of the optimizer, another network), and wrappers such
as DDP or torch.compile put prefixes before the names. This module knows no format of a training. It looks for the
names: wherever all tensors of the model are, in their shapes and below one common prefix, these are its weights.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Components that wrappers put into the middle of a name, where they wrap a part of the model.
_INNER = re.compile(r"(?<=\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OPTIMIZER = frozenset({"opt", "optim", "optimizer", "optimizers", "optimiser"})
_AVERAGED = frozenset({"ema", "swa", "averaged"})
_SHOWN, _LONGEST = 10, 40  # entries, and characters of a name, in a message


class Candidate(NamedTuple):
    """Tensors of a checkpoint by the names that they have in the model; `place` says where they are."""

    place: str
    state: dict[str, Tensor]


class Found(NamedTuple):
    """The parts of a checkpoint that fit a model, the preferred one first, and the one that comes closest to it."""

    fitting: list[Candidate]
    closest: Candidate | None  # None if no part has at least half of the model's names


def find(contents: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Found:
    """Look for the model whose tensors have these names and shapes.

    Averaged weights are preferred (a name on the way to them has the word "ema", "swa" or "averaged"), then what is
    less deep, then what comes first in the file. Tensors in the state of an optimizer do not count.
    """
    fitting, closest, most = [], None, 0
    for place, tensors in _groups(contents):
        names = _plain_names(tensors)
        counts = Counter(name[:start] for name in names for start in _starts(name) if name[start:] in shapes)
        whole = [prefix for prefix, count in counts.items() if count == len(shapes)]
        for prefix in sorted(counts, key=len):
            candidate = _candidate(place, prefix, names, shapes, [p for p in whole if p != prefix])
            if prefix in whole and all(candidate.state[name].shape == shape for name, shape in shapes.items()):
                fitting.append(candidate)
            if counts[prefix] > most and 2 * counts[prefix] >= len(shapes):
                closest, most = candidate, counts[prefix]
    return Found(sorted(fitting, key=lambda candidate: not _words(candidate.place) & _AVERAGED), closest)


def outline(contents: Mapping[str, Any]) -> str:
    """What a checkpoint holds, as a short list for a message."""
    entries, holders = [], set()
    for place, tensors in _groups(contents):
        names = ", ".join(map(_short, list(tensors)[:2])) + ", …" * (len(tensors) > 2)
        count = f"{len(tensors)} tensor{'s' * (len(tensors) > 1)}"
        entries.append(f"{_short('.'.join(place))} ({count}: {names})" if place else f"{count} ({names})")
        holders.update(place[:1])
    entries += [f"{_short(str(name))} ({type(value).__name__})" for name, value in contents.items()
                if not isinstance(value, Tensor) and str(name) not in holders]
    rest = [f"and {len(entries) - _SHOWN} more"] if len(entries) > _SHOWN else []
    return "; ".join(entries[:_SHOWN] + rest) or "nothing"


def _groups(contents: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The dictionaries that hold tensors, at any depth but in the state of an optimizer, with the keys to them."""
    waiting, seen = deque([((), contents)]), set()
    while waiting:
        place, holder = waiting.popleft()
        if id(holder) in seen:  # a pickle may refer to the same object twice, even from within
            continue
        seen.add(id(holder))
        tensors = {}
        for name, value in holder.items() if isinstance(holder, Mapping) else enumerate(holder):
            if isinstance(value, Tensor):
                tensors[str(name)] = value
            elif isinstance(value, Mapping | list | tuple) and not _words(str(name)) & _OPTIMIZER:
                waiting.append(((*place, str(name)), value))
        if tensors:
            yield place, tensors


def _words(name: str) -> set[str]:
    return set(re.split(r"[._]", name.casefold()))


def _plain_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names without the wrappers in the middle, if the names stay distinct."""
    plain = {_INNER.sub("", name): tensor for name, tensor in tensors.items()}
    return plain if len(plain) == len(tensors) else tensors


def _starts(name: str) -> Iterator[int]:
    """Where the name of a parameter may start within `name`: at its beginning and after each dot."""
    yield 0
    for dot in re.finditer(r"\.", name):
        yield dot.end()


def _candidate(
    place: tuple[str, ...], prefix: str, names: dict[str, Tensor], shapes: Mapping[str, torch.Size], others: list[str]
) -> Candidate:
    """All tensors below `prefix`, but those of another model below a longer prefix, and single numbers beside them.

    Averages of weights carry such numbers: a decay, or how many steps they average.
    """
    longer = tuple(other for other in others if other.startswith(prefix))
    state = {}
    for name, tensor in names.items():
        inner = name[len(prefix) :]
        if not name.startswith(prefix) or (longer and name.startswith(longer)):
            continue
        if inner in shapes or tensor.dim() or "." in inner:
            state[inner] = tensor
    return Candidate(".".join((*place, prefix)).rstrip("."), state)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
