"""Floating-point arithmetic: f32, f64, f16, bf16 and pairs of the last two."""

from __future__ import annotations

import numpy as np

from . import numerics
from .binding import FLOATS, Binder, Execute, assign, instruction

_HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def _kind(b: Binder) -> tuple[str, bool]:
    """The type, and whether there is `.ftz`. A rounding other than `.rn`, the default, is left to `_directed` or
    refused."""
    kind = b.type(*FLOATS)
    b.flag("rn")
    return kind, b.flag("ftz")


def _directed(b: Binder, kind: str, exact, nearest):
    """Returns `nearest`, or, if a rounding is named, a function that rounds the exact result (f64, rounded to odd)
    so."""
    rounding = b.one_of(("rz", "rm", "rp"), "none")
    if rounding == "none":
        return nearest
    if kind != "f32":
        raise b.error(f"unsupported rounding .{rounding} with .{kind}")
    return lambda *values: numerics.directed(exact(*(x.astype(np.float64) for x in values)), rounding)


def _apply(b: Binder, kind: str, ftz: bool, function, sources: int) -> Execute:
    """`dest = function(*sources)`, in f32 or f64. Half types are computed in f64 and rounded once to the type."""
    dest = b.dest(0, kind)
    inputs = [b.source(i + 1, kind) for i in range(sources)]
    if kind in _HALVES:
        if ftz:
            raise b.error(f"unsupported: .ftz with .{kind}")

        def halves():
            values = [numerics.load(x, kind).astype(np.float64) for x in inputs]
            return numerics.store(function(*values), kind).view(dest.dtype)

        return assign(dest, halves, [])
    if not ftz:
        return assign(dest, function, inputs)
    if kind != "f32":
        raise b.error(".ftz is defined for .f32 only")
    return assign(dest, lambda *values: numerics.flush(function(*map(numerics.flush, values))), inputs)


def _saturated(function):
    """`.sat`: the result is clamped to [0, 1]; NaN gives +0."""

    def clamped(*values):
        result = function(*values)
        return np.where(result > 0, np.minimum(result, result.dtype.type(1)), result.dtype.type(0))

    return clamped


@instruction("add", "sub", "mul", floating=True)
def _arithmetic(b: Binder) -> Execute:
    kind, ftz = _kind(b)
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[b.name]
    exact = {"add": numerics.sum_odd, "sub": lambda x, y: numerics.sum_odd(x, -y), "mul": np.multiply}[b.name]
    function = _directed(b, kind, exact, function)
    if b.flag("sat"):
        function = _saturated(function)
    return _apply(b, kind, ftz, function, 2)


@instruction("fma", "mad", floating=True)
def _fma(b: Binder) -> Execute:
    kind, ftz = _kind(b)
    relu, saturate = b.flag("relu"), b.flag("sat")
    if kind == "f32":
        product = b.machine.scratch(np.float64)

        def function(x, y, z):
            return numerics.fma_f32(x, y, z, product)

    elif kind == "f64":
        function = numerics.fma_f64
    else:

        def function(x, y, z):
            return numerics.sum_odd(x * y, z)

    function = _directed(b, kind, lambda x, y, z: numerics.sum_odd(x * y, z), function)
    if relu:
        plain = function

        def function(x, y, z):
            return np.fmax(plain(x, y, z), 0.0)

    return _apply(b, kind, ftz, _saturated(function) if saturate else function, 3)


@instruction("div", floating=True)
def _division(b: Binder) -> Execute:
    # .full and .approx are correctly rounded here.
    b.flag("full", "approx")
    kind, ftz = _kind(b)
    return _apply(b, kind, ftz, np.divide, 2)


@instruction("min", "max", floating=True)
def _extremum(b: Binder) -> Execute:
    kind, ftz = _kind(b)
    nan, name = b.flag("NaN"), b.name
    count = 3 if b.count == 4 else 2
    if b.flag("xorsign"):
        raise b.error("unsupported modifier .xorsign")

    def function(x, y, *rest):
        result = numerics.minimum_or_maximum(name, x, y, nan)
        return numerics.minimum_or_maximum(name, result, rest[0], nan) if rest else result

    return _apply(b, kind, ftz, function, count)


@instruction("neg", "abs", floating=True)
def _sign(b: Binder) -> Execute:
    kind, ftz = _kind(b)
    if ftz and kind == "f32":
        return _apply(b, kind, ftz, np.negative if b.name == "neg" else np.abs, 1)
    if ftz:
        raise b.error(f"unsupported: .ftz with .{kind}")
    # Changes the sign bits only, so that NaN and subnormal values keep their other bits.
    bits = {"f32": "u32", "f64": "u64", "f16x2": "u32", "bf16x2": "u32"}.get(kind, "u16")
    dest, source = b.dest(0, bits), b.source(1, bits)
    sign = {"f32": 0x80000000, "f64": 1 << 63, "f16x2": 0x80008000, "bf16x2": 0x80008000}.get(kind, 0x8000)
    constant = dest.dtype.type(sign)
    if b.name == "neg":
        return assign(dest, np.bitwise_xor, [source, np.broadcast_to(constant, dest.shape)])
    return assign(dest, np.bitwise_and, [source, np.broadcast_to(~constant, dest.shape)])


def _in_double(function):
    """An f32 function computed in f64. The result is correctly rounded, except for rare ties."""

    def rounded(x):
        return function(x.astype(np.float64)).astype(x.dtype)

    return rounded


_FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@instruction(*_FUNCTIONS, floating=True)
def _function(b: Binder) -> Execute:
    exact = b.name in ("rcp", "sqrt")
    approximate = b.flag("approx")
    kind, ftz = _kind(b)
    if not approximate and not exact:
        raise b.error(f"{b.name} needs .approx")
    if kind == "f64" and approximate:
        raise b.error("unsupported: .approx with .f64")
    function = _FUNCTIONS[b.name]
    # .ftz of half types (ex2.approx.ftz.bf16) is ignored: it concerns results below 2**-126.
    return _apply(b, kind, ftz and kind == "f32", _in_double(function) if kind == "f32" else function, 1)


@instruction("copysign", floating=True)
def _copysign(b: Binder) -> Execute:
    # Combines the sign of the first source with the magnitude of the second.
    kind = b.type("f32", "f64")
    return _apply(b, kind, False, lambda x, y: np.copysign(y, x), 2)


@instruction("testp", floating=True)
def _testp(b: Binder) -> Execute:
    kind = b.type("f32", "f64")
    name = b.one_of(("finite", "infinite", "number", "notanumber", "normal", "subnormal"))
    smallest = np.finfo({"f32": np.float32, "f64": np.float64}[kind]).tiny
    tests = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= smallest),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < smallest),
    }
    return assign(b.dest(0, "pred"), tests[name], [b.source(1, kind)])
