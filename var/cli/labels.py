"""Parses the value of --labels: class numbers, ranges, names and repetitions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence


def parse_labels(text: str, class_names: Sequence[str], count: int = 1) -> list[int]:
    """The class numbers of a list such as ``"0,3-5,trouser*4,all"``, whose items are numbers, ranges, names or all.

    ``*N`` asks for N images of each class of an item, instead of `count`. The case of names does not matter.

    Raises ValueError for a number out of range, an unknown name, or an empty list.
    """
    names = {name.casefold(): label for label, name in enumerate(class_names)}
    labels: list[int] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        repeated = re.fullmatch(r"(.+?)\s*[*×]\s*(\d+)", item)
        if item.casefold() not in names and repeated:
            members, times = _members(repeated[1], names, class_names), int(repeated[2])
        else:
            members, times = _members(item, names, class_names), count
        labels += [label for label in members for _ in range(times)]
    if not labels:
        raise ValueError(f"--labels: expected at least one class, got {text!r}")
    return labels


def _members(item: str, names: dict[str, int], class_names: Sequence[str]) -> Sequence[int]:
    last = len(class_names) - 1
    if item.casefold() in names:
        return [names[item.casefold()]]
    if item.casefold() == "all":
        return range(last + 1)
    numbers = re.fullmatch(r"(-?\d+)(?:\s*-\s*(\d+))?", item)
    if numbers is None:
        near = difflib.get_close_matches(item.casefold(), names, n=3)
        known = [class_names[names[name]] for name in near] or list(class_names[:20])
        raise ValueError(f"--labels: expected numbers and ranges within 0-{last}, all, or names such as "
                         f"{', '.join(known)}, got {item!r}")
    first, final = int(numbers[1]), int(numbers[2] or numbers[1])
    if not 0 <= first <= final <= last:
        raise ValueError(f"--labels: expected class numbers in 0-{last}, got {item!r}")
    return range(first, final + 1)
