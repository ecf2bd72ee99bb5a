"""Parses the value of --labels: class numbers, ranges, names and repetitions.

A number is the place of a class in the list of classes, counted from 0, unless all classes have numbers as names. Then
it is a name, also in a range: folders 0 to 11 may be in the order 0, 1, 10, 11, 2 …, and 10-11 means folders 10 and 11.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_MOST_IMAGES = 10_000_000  # of one command; lists of more labels fill the memory before the first image is there
_SHOWN = 20


def parse_labels(text: str, class_names: Sequence[str], count: int = 1) -> list[int]:
    """The class numbers of a list such as ``"0,3-5,trouser*4,all"``, whose items are numbers, ranges, names or all.

    ``*N`` asks for N images of each class of an item, instead of `count`. The case of names does not matter, unless two
    names differ in nothing else.

    Raises ValueError for a number out of range, an unknown name, an item that may mean two classes, or an empty list.
    """
    classes, labels = _Classes(class_names), []
    for item in filter(None, (part.strip() for part in text.split(","))):
        repeated = re.fullmatch(r"(.+?)\s*[*×]\s*(\d{1,18})", item)
        if repeated and not classes.named(item):
            members, times = classes.members(repeated[1]), int(repeated[2])
        else:
            members, times = classes.members(item), count
        if len(labels) + len(members) * times > _MOST_IMAGES:
            raise ValueError(f"--labels: expected at most {_MOST_IMAGES:,} images, got "
                             f"{len(labels) + len(members) * times:,} with {item!r}")
        labels += [label for label in members for _ in range(times)]
    if not labels:
        raise ValueError(f"--labels: expected at least one class, got {text!r}")
    return labels


def are_numbers(class_names: Sequence[str]) -> bool:
    """Whether all classes have numbers as names, so that a number means a name and not a place in the list."""
    return all(_number(name) is not None for name in class_names)


def _number(name: str) -> int | None:
    return int(name) if re.fullmatch(r"-?\d{1,18}", name) else None


class _Classes:
    """The classes of a model, found by name or number."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._by_name: dict[str, list[int]] = {}
        for label, name in enumerate(names):
            self._by_name.setdefault(name.casefold(), []).append(label)
        self._numerals = {label: number for label, name in enumerate(names) if (number := _number(name)) is not None}
        self._places = not are_numbers(names)
        self._by_number: dict[int, list[int]] = {}
        for label in range(len(names)):
            self._by_number.setdefault(label if self._places else self._numerals[label], []).append(label)

    def named(self, item: str) -> list[int]:
        """The classes of this name: those with the same case, else those with any."""
        labels = self._by_name.get(item.casefold(), [])
        return [label for label in labels if self._names[label] == item] or labels

    def members(self, item: str) -> list[int]:
        """The classes that an item without a repetition means."""
        if labels := self.named(item):
            return [self._only(item, labels)]
        if item.casefold() == "all":
            return list(range(len(self._names)))
        numbers = re.fullmatch(r"(-?\d{1,18})(?:\s*-\s*(-?\d{1,18}))?", item)
        if numbers is None:
            raise ValueError(f"--labels: expected {self._expected(item)}, got {item!r}")
        first, final = int(numbers[1]), int(numbers[2] or numbers[1])
        if first > final or first not in self._by_number or final not in self._by_number:
            raise ValueError(f"--labels: expected {self._expected_numbers()}, got {item!r}")
        found = [number for number in sorted(self._by_number) if first <= number <= final]
        labels = [self._only(str(number), self._by_number[number]) for number in found]
        other = [self._names[label] for label, number in self._numerals.items() if first <= number <= final
                 and self._places and label != number]
        if other:
            raise ValueError(f"--labels: expected names one by one, because some classes of this model have numbers as "
                             f"names (such as {other[0]}), got {item!r}")
        return labels

    def _only(self, item: str, labels: list[int]) -> int:
        if len(labels) > 1:
            meant = ", ".join(f"{self._names[label]!r} (number {label})" for label in labels)
            raise ValueError(f"--labels: expected the name of one class, got {item!r}, which may mean {meant}")
        return labels[0]

    def _expected(self, item: str) -> str:
        if not self._places:
            return self._expected_numbers()
        near = difflib.get_close_matches(item.casefold(), self._by_name, n=3)
        known = [self._names[self._by_name[name][0]] for name in near] or self._names[:_SHOWN]
        return f"numbers and ranges within 0-{len(self._names) - 1}, all, or names such as {', '.join(known)}"

    def _expected_numbers(self) -> str:
        if self._places or all(label == number for label, number in self._numerals.items()):
            return f"class numbers in 0-{len(self._names) - 1}"
        known = sorted(self._numerals.values())
        shown = ", ".join(map(str, known[:_SHOWN])) + ", …" * (len(known) > _SHOWN)
        return f"all, or numbers and ranges among the names of the classes, which are {shown}"
