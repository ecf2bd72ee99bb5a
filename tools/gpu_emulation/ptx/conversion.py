"""Conversions (cvt) between all types, and createpolicy."""

from __future__ import annotations

import numpy as np

from . import numerics
from .binding import DTYPES, Binder, Execute, assign, bits_of, instruction

_INTEGERS = tuple(f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64))
_FLOATS = ("f16", "bf16", "f32", "f64")
_PAIRS = ("f16x2", "bf16x2")


@instruction("cvt")
def _cvt(b: Binder) -> Execute:
    source = b.type(*_INTEGERS, *_FLOATS)
    target = b.type(*_INTEGERS, *_FLOATS, *_PAIRS, "tf32")
    if target in _PAIRS:
        return _pair(b, target, source)
    if target == "tf32":
        return _tf32(b, source)
    value = b.value(b.operand(1), source, narrow=True)
    if source in _INTEGERS and target in _INTEGERS:
        function = _integers(target, b.flag("sat"))
    elif source in _INTEGERS:
        b.one_of(("rn",))
        function = _integer_to_float(target)
    elif target in _INTEGERS:
        function = _float_to_integer(b, source, target)
    else:
        function = _floats(b, source, target)
    dest = b.wide_result(b.operand(0), _bit_type(target))
    return assign(dest, function, [value])


def _bit_type(kind: str) -> str:
    return f"u{bits_of(kind)}" if kind in _FLOATS else kind


def _integers(target: str, saturate: bool):
    dtype = DTYPES[target]
    if not saturate:
        return lambda x: x.astype(dtype)
    limits = np.iinfo(dtype)

    def clamped(x):
        here = np.iinfo(x.dtype)
        low, high = max(limits.min, here.min), min(limits.max, here.max)
        return x.clip(low, high).astype(dtype)

    return clamped


def _encode(values: np.ndarray, target: str) -> np.ndarray:
    """f64 values as the bits of `target`, rounded to nearest even."""
    if target == "f64":
        return values.view(np.uint64)
    if target == "f32":
        return values.astype(np.float32).view(np.uint32)
    return numerics.store(values, target)


def _integer_to_float(target: str):
    if target in ("f32", "f64"):
        # Converted directly: through f64, 64-bit integers would be rounded twice.
        return lambda x: x.astype(DTYPES[target]).view(DTYPES[_bit_type(target)])
    return lambda x: _encode(x.astype(np.float64), target)


def _decode(x: np.ndarray, source: str) -> np.ndarray:
    return numerics.load(x, source) if source in ("f16", "bf16") else x


def _float_to_integer(b: Binder, source: str, target: str):
    rounding = numerics.ROUNDINGS[b.one_of(tuple(numerics.ROUNDINGS))]
    ftz = b.flag("ftz")
    b.flag("sat")  # these conversions always saturate
    dtype = DTYPES[target]
    limits = np.iinfo(dtype)

    def saturated(x):
        values = _decode(x, source)
        if ftz:
            values = numerics.flush(values)
        whole = rounding(values.astype(np.float64))
        # The largest 64-bit integers are no f64 numbers, so values that reach the limits are set separately. NaN gives
        # 0.
        above, below = whole >= float(limits.max), whole <= float(limits.min)
        inside = np.where(above | below | np.isnan(whole), 0.0, whole)
        result = inside.astype(dtype)
        result[above] = limits.max
        result[below] = limits.min
        return result

    return saturated


def _floats(b: Binder, source: str, target: str):
    ftz, saturate, relu = b.flag("ftz"), b.flag("sat"), b.flag("relu")
    narrowing = bits_of(target) < bits_of(source) or {source, target} == {"f16", "bf16"}
    if source == target:
        rounding = numerics.ROUNDINGS.get(b.one_of(tuple(numerics.ROUNDINGS), "none"))
    else:
        rounding = None
        if narrowing and b.one_of(("rn", "rz")) == "rz":
            if (source, target) != ("f32", "bf16") or ftz or saturate or relu:
                raise b.error("unsupported rounding .rz")
            return numerics.f32_to_bf16_towards_zero
    if (source, target) == ("f32", "bf16") and not (ftz or saturate or relu):
        return numerics.f32_to_bf16
    if (source, target) == ("bf16", "f32") and not (ftz or saturate or relu):
        return lambda x: x.astype(np.uint32) << np.uint32(16)

    def convert(x):
        values = _decode(x, source)
        if ftz and values.dtype == np.float32:
            values = numerics.flush(values)
        values = values.astype(np.float64)
        if rounding is not None:
            values = rounding(values)
        if saturate:
            values = np.where(values > 0, np.minimum(values, 1.0), 0.0)
        if relu:
            values = np.where(values < 0, 0.0, values)
        bits = _encode(values, target)
        if ftz and target == "f32":
            return numerics.flush(bits.view(np.float32)).view(np.uint32)
        return bits

    return convert


def _pair(b: Binder, target: str, source: str) -> Execute:
    """cvt.rn.bf16x2.f32 d, a, b: a goes to the upper half."""
    if source != "f32":
        raise b.error(f"unsupported conversion from .{source} to .{target}")
    rounding, relu = b.one_of(("rn", "rz")), b.flag("relu")
    high, low = b.source(1, "f32"), b.source(2, "f32")
    if target == "bf16x2":
        encode = numerics.f32_to_bf16 if rounding == "rn" else numerics.f32_to_bf16_towards_zero
    elif rounding == "rn":
        encode = numerics.to_f16
    else:
        raise b.error("unsupported rounding .rz")

    def convert(x, y):
        if relu:
            x, y = (np.where(value < 0, np.float32(0), value) for value in (x, y))
        return (encode(x).astype(np.uint32) << np.uint32(16)) | encode(y)

    return assign(b.dest(0, "u32"), convert, [high, low])


def _tf32(b: Binder, source: str) -> Execute:
    if source != "f32":
        raise b.error(f"unsupported conversion from .{source} to .tf32")
    b.one_of(("rna",))
    return assign(b.dest(0, "u32"), numerics.round_tf32, [b.source(1, "f32")])


@instruction("createpolicy")
def _createpolicy(b: Binder) -> Execute:
    """Gives any value: a cache policy is only an operand of cache hints, and these do not change results."""
    b.one_of(("fractional",))
    for level in ("L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"):
        b.flag(level)
    b.type("b64")
    for index in range(1, b.count):
        b.value(b.operand(index), "f32")
    dest = b.dest(0, "u64")
    return lambda mask: np.copyto(dest, np.uint64(0), where=mask)
