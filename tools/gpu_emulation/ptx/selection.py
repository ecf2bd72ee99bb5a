"""Comparison, selection, moves, and conversion of addresses between state spaces."""

from __future__ import annotations

import numpy as np

from . import numerics
from .binding import DTYPES, INTEGERS, UNTYPED, Binder, Execute, assign, bits_of, instruction
from .machine import LOCAL_WINDOW, SHARED_WINDOW

_ORDERED = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _comparison(b: Binder, kind: str):
    """The function of two arrays for a comparison. Ordered comparisons with a NaN are false; those named ...u are
    true."""
    names = [*_ORDERED, *_UNSIGNED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
    name = b.one_of(names)
    if kind in ("f32", "f64", "f16", "bf16"):
        if name == "num":
            return lambda x, y: ~(np.isnan(x) | np.isnan(y))
        if name == "nan":
            return lambda x, y: np.isnan(x) | np.isnan(y)
        if name == "ne":
            return lambda x, y: (x < y) | (x > y)
        if name == "neu":
            return np.not_equal
        if name in _ORDERED:
            return _ORDERED[name]
        if name.endswith("u"):
            inverse = {"equ": None, "ltu": np.greater_equal, "leu": np.greater, "gtu": np.less_equal, "geu": np.less}
            opposite = inverse[name]
            return (lambda x, y: ~((x < y) | (x > y))) if opposite is None else (lambda x, y: ~opposite(x, y))
    elif name in _UNSIGNED and kind[0] == "u":
        return _ORDERED[_UNSIGNED[name]]
    elif name in ("eq", "ne") or (name in _ORDERED and kind[0] != "b"):
        return _ORDERED[name]
    raise b.error(f"no comparison .{name} for .{kind}")


def _compared(b: Binder, first: int):
    """The comparison of setp and set, as a function without arguments. It is ANDed, ORed or XORed with a predicate."""
    kind = b.type(*INTEGERS, *UNTYPED, "f16", "bf16", "f32", "f64")
    ftz = b.flag("ftz")
    compare = _comparison(b, kind)
    combine = b.one_of(("and", "or", "xor"), "none")
    x, y = b.source(first, kind), b.source(first + 1, kind)
    if kind == "bf16":
        plain, compare = compare, lambda x, y: plain(numerics.bf16_to_f32(x), numerics.bf16_to_f32(y))
    elif ftz and kind == "f32":
        plain, compare = compare, lambda x, y: plain(numerics.flush(x), numerics.flush(y))
    if combine == "none":
        return compare, x, y, None
    ufunc = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]
    other = b.predicate(first + 2)
    return compare, x, y, (ufunc, other)


@instruction("setp")
def _setp(b: Binder) -> Execute:
    operand = b.operand(0)
    compare, x, y, combination = _compared(b, 1)
    targets = operand if isinstance(operand, tuple) else (operand,)
    dest = b.result(targets[0], "pred")
    if len(targets) == 1 and combination is None:
        return assign(dest, compare, [x, y])
    second = b.result(targets[1], "pred") if len(targets) > 1 else None

    def execute(mask):
        result, opposite = compare(x, y), None
        if second is not None:
            opposite = ~result
        if combination is not None:
            ufunc, other = combination
            third = other().copy()
            result = ufunc(result, third)
            opposite = None if opposite is None else ufunc(opposite, third)
        np.copyto(dest, result, where=mask)
        if second is not None:
            np.copyto(second, opposite, where=mask)

    return execute


@instruction("set")
def _set(b: Binder) -> Execute:
    source = b.modifiers.pop()
    result = b.type("u32", "s32", "f32")
    b.modifiers.append(source)
    compare, x, y, combination = _compared(b, 1)
    true = np.float32(1).view(np.uint32) if result == "f32" else np.uint32(0xFFFFFFFF)

    def value():
        outcome = compare(x, y)
        if combination is not None:
            outcome = combination[0](outcome, combination[1]())
        return np.where(outcome, true, np.uint32(0))

    return assign(b.dest(0, "u32"), value, [])


@instruction("selp")
def _selp(b: Binder) -> Execute:
    kind = b.type(*INTEGERS, *UNTYPED, "f32", "f64")
    kind = f"u{bits_of(kind)}"
    dest, x, y = b.dest(0, kind), b.source(1, kind), b.source(2, kind)
    condition = b.predicate(3)
    return assign(dest, lambda: np.where(condition(), x, y), [])


@instruction("slct")
def _slct(b: Binder) -> Execute:
    sign = b.type("s32", "f32")
    kind = b.type(*INTEGERS, *UNTYPED, "f32", "f64")
    ftz = b.flag("ftz")
    dest, x, y, c = b.dest(0, kind), b.source(1, kind), b.source(2, kind), b.source(3, sign)
    return assign(dest, lambda: np.where((numerics.flush(c) if ftz else c) >= 0, x, y), [])


@instruction("mov")
def _mov(b: Binder) -> Execute:
    kind = b.type("pred", *UNTYPED, *INTEGERS, "f32", "f64")
    to, source = b.operand(0), b.operand(1)
    if isinstance(to, tuple) or isinstance(source, tuple):
        return _mov_parts(b, kind, to, source)
    if kind == "pred":
        condition, dest = b.predicate(1), b.dest(0, "pred")
        return assign(dest, condition, [])
    kind = f"u{bits_of(kind)}"
    dest, value = b.dest(0, kind), b.source(1, kind)
    return lambda mask: np.copyto(dest, value, where=mask)


def _mov_parts(b: Binder, kind: str, to, source) -> Execute:
    """Packs a vector of registers into one register, or unpacks it."""
    parts = to if isinstance(to, tuple) else source
    width = bits_of(kind) // len(parts)
    if width not in (16, 32) or (isinstance(to, tuple) and isinstance(source, tuple)):
        raise b.error("unsupported vector move")
    part, dtype = f"u{width}", DTYPES[f"u{width}"]
    if isinstance(to, tuple):
        whole = b.value(source, f"u{bits_of(kind)}")
        dests = [(b.result(item, part), i) for i, item in enumerate(to) if item != "_"]

        def execute(mask):
            pieces = np.ascontiguousarray(whole).view(dtype).reshape(-1, len(parts)).copy()
            for dest, i in dests:
                np.copyto(dest, pieces[:, i], where=mask)

    else:
        dest = b.dest(0, f"u{bits_of(kind)}")
        values = [b.value(item, part) for item in source]

        def execute(mask):
            np.copyto(dest, np.stack(values, 1).view(dest.dtype)[:, 0], where=mask)

    return execute


@instruction("cvta")
def _cvta(b: Binder) -> Execute:
    kind = b.type("u64", "u32")
    to = b.flag("to")
    space = b.one_of(("global", "shared", "shared::cta", "local", "const"))
    window = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space, 0)
    if window and kind == "u32":
        raise b.error("generic addresses have 64 bits")
    dest, value = b.dest(0, kind), b.source(1, kind)
    shift = value.dtype.type(window)
    return assign(dest, (lambda: value - shift) if to else (lambda: value + shift), [])
