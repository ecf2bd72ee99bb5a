"""Limits for the compiled kernels: rules that always hold, and the committed budgets of `budgets.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from var_kernels.native.build import write_atomically
from var_kernels.triton.targets import TARGETS

from .rows import Failure, Row

PATH = Path(__file__).with_name("budgets.json")
ACCESSES = ("loads", "async copies", "stores")
_REGISTER_UNIT = 8  # registers per thread are allocated in this unit
_SEPARATOR = " | "


def check(results: Sequence[Row | Failure], budgets: dict[str, dict], complete: Collection[str]) -> list[str]:
    """Returns a sentence for every violation. `complete`: the backends whose problems and targets were all compiled, so
    that none of their kernels may be missing."""
    rows = [row for row in results if isinstance(row, Row)]
    violations = [str(failure) for failure in results if isinstance(failure, Failure)]
    for row in rows:
        violations += [f"{', '.join(row.key)}: {text}" for text in _broken_rules(row)]
    measured = measure(rows)
    for key, got in measured.items():
        where = key.replace(_SEPARATOR, ", ")
        if key not in budgets:
            violations.append(f"{where}: has no budget; --update-budgets records one")
        else:
            violations += [f"{where}: {text}" for text in _over_budget(got, budgets[key])]
    failed = {(f.op, f.problem, f.backend, f.target) for f in results if isinstance(f, Failure)}
    for key in sorted(set(budgets) - set(measured)):
        op, problem, backend, _, target = key.split(_SEPARATOR)
        if backend in complete and (op, problem, backend, target) not in failed:
            violations.append(f"{key.replace(_SEPARATOR, ', ')}: is no longer launched; --update-budgets removes it")
    return violations


def _broken_rules(row: Row) -> Iterable[str]:
    target = TARGETS[row.target]
    spilled_to = "local memory" if target.api == "cuda" else "scratch"
    if row.spills or (row.stack and target.api == "hip"):
        yield f"spills: expected none, got {row.spills}, {row.stack} bytes of {spilled_to} per thread"
    if row.shared_memory > target.shared_memory:
        yield f"shared memory: expected at most the card's {target.shared_memory} bytes, got {row.shared_memory}"
    if row.has_16bit_products and not row.tensor:
        yield "tensor cores: expected instructions for the products of 16-bit matrices, got none"
    if row.counts.get("rounded fp32", 0):
        yield f"tensor cores: expected IEEE products of fp32, got {row.counts['rounded fp32']} instructions in tf32"
    if row.counts.get("atomics", 0):
        yield f"atomics: expected none, because the order of sums must not vary, got {row.counts['atomics']}"


def _over_budget(got: dict, budget: dict) -> Iterable[str]:
    for name in ("registers", "shared_memory"):
        if got[name] > budget[name]:
            yield f"{name.replace('_', ' ')}: expected at most {budget[name]}, got {got[name]}"
    for name in ACCESSES:
        if name in budget and got.get(name, 0.0) < budget[name]:
            yield f"{name} of 128 bits: expected a share of at least {budget[name]:.2f}, got {got.get(name, 0.0):.2f}"
    lost = sorted(set(budget.get("tensor", ())) - set(got.get("tensor", ())))
    if lost:
        found = ", ".join(got.get("tensor", ())) or "none"
        yield f"tensor cores: expected instructions {', '.join(lost)}, got {found}"


def measure(rows: Iterable[Row]) -> dict[str, dict]:
    """The numbers that budgets limit: for a kernel in a problem on a target, the worst of its rows."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(_SEPARATOR.join(row.key), []).append(row)
    return {key: _worst(group) for key, group in grouped.items()}


def _worst(rows: Sequence[Row]) -> dict:
    worst: dict = {name: max(getattr(row, name) for row in rows) for name in ("registers", "shared_memory")}
    for name in ACCESSES:
        shares = [share for row in rows if (share := row.wide_share(name)) is not None]
        if shares:
            worst[name] = min(shares)
    kinds = set.intersection(*(set(row.tensor) for row in rows))
    if kinds:
        worst["tensor"] = sorted(kinds)
    return worst


def allowance(measured: dict) -> dict:
    """The budget for measured numbers. Registers are rounded up to the next unit of allocation. Shares are lowered a
    little, because another version of the compiler may add a single narrow access."""
    budget = {**measured, "registers": -(-measured["registers"] // _REGISTER_UNIT) * _REGISTER_UNIT}
    for name in ACCESSES:
        if name in budget:
            budget[name] = max(0.0, round(math.floor(budget[name] * 20) / 20 - 0.05, 2))
            if not budget[name]:
                del budget[name]
    return budget


def load(path: Path = PATH) -> tuple[dict[str, dict], dict[str, str]]:
    """The committed budgets, and the releases of the compilers that they were recorded with.

    Both are empty if there is no such file. ValueError if it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return dict(content["budgets"]), dict(content["recorded with"])
    except FileNotFoundError:
        return {}, {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the budgets that --update-budgets writes, got {error!r}") from error


def save(budgets: dict[str, dict], releases: Mapping[str, str], path: Path = PATH) -> None:
    """Writes a line per kernel, problem and target, sorted, so that the order does not depend on when each was updated.
    The file is replaced atomically."""
    targets = list(TARGETS)
    keys = sorted(budgets, key=lambda key: (*key.split(_SEPARATOR)[:-1], targets.index(key.split(_SEPARATOR)[-1])))
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(budgets[key])}" for key in keys)
    text = f'{{\n "recorded with": {json.dumps(dict(releases))},\n "budgets": {{\n{lines}\n }}\n}}\n'
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def update(results: Sequence[Row | Failure], budgets: dict[str, dict], complete: Collection[str]) -> dict[str, dict]:
    """The budgets with those of `results` replaced, and without those of kernels that are no longer launched."""
    measured = measure(row for row in results if isinstance(row, Row))
    merged = {key: budget for key, budget in budgets.items() if key.split(_SEPARATOR)[2] not in complete}
    merged.update({key: allowance(value) for key, value in measured.items()})
    return merged
