"""The floating-point arithmetic of PTX on numpy arrays.

These are exact: f32 and f64 operations (to nearest even; add, sub, mul and fma of f32 also towards zero, down and up),
fused multiply-add (with one rounding; an f32 result below the normal range may be rounded twice), conversions, and
single operations in f16 and bf16, which are computed in double precision and rounded once.

Approximate instructions (ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh with .approx, div.approx, div.full) give the
correctly rounded value. The hardware's value has an error of up to a few units in the last place. The payload of NaN
results is numpy's, except where the instruction set specifies it: conversions, min and max.
"""

from __future__ import annotations

import numpy as np

SMALLEST_NORMAL = np.float32(2.0**-126)


def flush(values: np.ndarray) -> np.ndarray:
    """Implements `.ftz`: subnormal f32 values become zeros of the same sign."""
    return np.where(np.abs(values) < SMALLEST_NORMAL, np.copysign(np.float32(0), values), values)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """f32 to the bits of bf16, rounded to nearest even. NaN gives 0x7FFF."""
    word = np.ascontiguousarray(values).view(np.uint32)
    odd = (word >> np.uint32(16)) & np.uint32(1)
    rounded = ((word + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def f32_to_bf16_towards_zero(values: np.ndarray) -> np.ndarray:
    word = np.ascontiguousarray(values).view(np.uint32)
    return np.where(np.isnan(values), np.uint16(0x7FFF), (word >> np.uint32(16)).astype(np.uint16))


def f64_to_f32_odd(values: np.ndarray) -> np.ndarray:
    """f64 to f32, rounded to odd. Rounding this result again, to fewer bits, gives the same as rounding once."""
    rounded = values.astype(np.float32)
    inexact = (rounded.astype(np.float64) != values) & np.isfinite(values)
    word = rounded.view(np.uint32)
    away = np.abs(rounded.astype(np.float64)) > np.abs(values)
    # Round towards zero first (drop the lower bits of the magnitude), then set the last bit if any dropped bit was set.
    truncated = np.where(inexact & away, word - np.uint32(1), word)
    return np.where(inexact, truncated | np.uint32(1), word).view(np.float32)


def to_f16(values: np.ndarray) -> np.ndarray:
    """f32 or f64 to the bits of f16, rounded to nearest even. NaN gives 0x7FFF."""
    return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))


def load(array: np.ndarray, kind: str) -> np.ndarray:
    """The values of f16 or bf16 operands (or the halves of pairs) in f32."""
    halves = (
        array.view(np.uint16) if array.strides == (array.itemsize,) else np.ascontiguousarray(array).view(np.uint16)
    )
    return bf16_to_f32(halves) if kind.startswith("bf") else halves.view(np.float16).astype(np.float32)


def store(values: np.ndarray, kind: str) -> np.ndarray:
    """f64 results as f16 or bf16 bits, or as the 32-bit words of pairs, rounded once."""
    bits = f32_to_bf16(f64_to_f32_odd(values)) if kind.startswith("bf") else to_f16(values)
    return bits.view(np.uint32) if kind.endswith("x2") else bits


def fma_f32(a: np.ndarray, b: np.ndarray, c: np.ndarray, product: np.ndarray) -> np.ndarray:
    """a * b + c with one rounding. `product` is scratch (float64).

    The product is exact in double precision, and the sum is rounded to 53 bits. A second rounding, to 24 bits, is wrong
    only if the first one gave the middle between two f32 numbers. These cases are found by their bits and corrected.
    """
    np.multiply(a, b, out=product, dtype=np.float64)
    product += c
    ties = (product.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    result = product.astype(np.float32)
    if ties.any():
        where = np.flatnonzero(ties)
        exact = a[where].astype(np.float64) * b[where].astype(np.float64)
        result[where] = sum_odd(exact, c[where].astype(np.float64)).astype(np.float32)
    return result


def sum_odd(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y in f64, rounded to odd. A second rounding, to fewer bits, then gives the same as rounding once."""
    total = x + y
    back = total - x
    error = (x - (total - back)) + (y - back)  # two-sum: total + error is the exact sum
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    neighbour = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & np.isfinite(error) & even, neighbour, total)


def directed(value: np.ndarray, rounding: str) -> np.ndarray:
    """f64 values, exact or rounded to odd, as f32, rounded by rz, rm or rp. An exact zero is +0 in every direction."""
    nearest = value.astype(np.float32)
    goal = {"rz": 0.0, "rm": -np.inf, "rp": np.inf}[rounding]
    passed = np.abs(nearest) > np.abs(value) if rounding == "rz" else (nearest > value if goal < 0 else nearest < value)
    return np.where(passed, np.nextafter(nearest, np.float32(goal)), nearest)


def fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in f64 with one rounding, element by element in exact rational arithmetic (slow, rarely used)."""
    from fractions import Fraction

    result = a * b + c
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    for i in np.flatnonzero(finite):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact:
            try:
                result[i] = exact.numerator / exact.denominator
            except OverflowError:
                result[i] = np.inf if exact > 0 else -np.inf
    return result


def minimum_or_maximum(name: str, a: np.ndarray, b: np.ndarray, propagate_nan: bool) -> np.ndarray:
    """PTX min and max of floats. -0 < +0. A NaN gives the other operand, or with .NaN the canonical NaN."""
    result = (np.fmin if name == "min" else np.fmax)(a, b)
    bits = np.dtype(f"u{a.dtype.itemsize}")
    x, y, word = a.view(bits), b.view(bits), result.view(bits)
    equal = a == b
    if equal.any():
        # Equal values with different bits are zeros, which differ in the sign bit.
        np.copyto(word, x | y if name == "min" else x & y, where=equal)
    unordered = np.isnan(a) | np.isnan(b) if propagate_nan else np.isnan(result)
    if unordered.any():
        np.copyto(word, bits.type(canonical_nan(bits.itemsize)), where=unordered)
    return result


def canonical_nan(width: int) -> int:
    return {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}[width]


def round_tf32(values: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32, as bits (uint32): 10 mantissa bits, rounded to nearest, ties away from zero."""
    word = values.view(np.uint32)
    rounded = (word + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    special = (word & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    kept = np.where(np.isnan(values), np.uint32(0x7FFFFFFF), word)
    return np.where(special, kept, rounded)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
