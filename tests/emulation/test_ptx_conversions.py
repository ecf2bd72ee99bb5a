"""The PTX interpreter: conversions, comparisons, selection and moves."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.helpers.ptx_snippets import compute, float_edges, grid, integer_edges, rounded, same

INTEGERS = {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
INTEGERS |= {"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64}


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowing_inputs() -> np.ndarray:
    """f32 values that sit on and next to the ties of bf16 and f16, of every size."""
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, 4000, dtype=np.uint64).astype(np.uint32)
    halfway = (words[:1000] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    for_f16 = (words[1000:2000] & np.uint32(0x8FFFE000)) | np.uint32(0x38001000)
    near = np.concatenate([halfway + np.uint32(1), halfway - np.uint32(1), for_f16 + np.uint32(1)])
    values = np.concatenate([words, halfway, for_f16, near]).view(np.float32)
    return np.concatenate([values, float_edges(np.float32)])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_narrowing_rounds_to_nearest_even(kind):
    x = narrowing_inputs()
    (found,) = compute(f"cvt.rn.{kind}.f32 %o0, %i0;", x, out=[np.uint16])
    values = bf16_values(found) if kind == "bf16" else found.view(np.float16)
    for source, value, bits in zip(x.tolist(), values.tolist(), found.tolist(), strict=True):
        if math.isnan(source):
            assert bits == 0x7FFF
        else:
            right = rounded(Fraction(source), kind) if math.isfinite(source) else source
            assert same(value, math.copysign(right, source)), source


def test_pairs_put_the_first_source_in_the_upper_half():
    a, b = np.array([1.0, np.nan], np.float32), np.array([-2.0, 0.5], np.float32)
    brain, half = compute("cvt.rn.bf16x2.f32 %o0, %i0, %i1; cvt.rn.f16x2.f32 %o1, %i0, %i1;", a, b, out=[np.uint32] * 2)
    assert brain.tolist() == [0x3F80C000, 0x7FFF3F00]
    assert half.tolist() == [0x3C00C000, 0x7FFF3800]


def test_widening_is_exact():
    bits = np.arange(0, 2**16, 7, dtype=np.uint16)
    half, brain = compute("cvt.f32.f16 %o0, %i0; cvt.f32.bf16 %o1, %i0;", bits, out=[np.float32] * 2)
    assert same(half, bits.view(np.float16).astype(np.float64)).all()
    assert same(brain, bf16_values(bits)).all()


def test_tf32_rounds_ties_away_from_zero():
    words = np.array([0x3F801000, 0x3F800FFF, 0xBF801000, 0x3F803000, 0x7F7FFFFF, 0x7F800000, 0x00001000], np.uint32)
    (found,) = compute("cvt.rna.tf32.f32 %o0, %i0;", words, out=[np.uint32])
    right = [0x3F802000, 0x3F800000, 0xBF802000, 0x3F804000, 0x7F800000, 0x7F800000, 0x00002000]
    assert found.tolist() == right


@pytest.mark.parametrize("target", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("rounding", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("source, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_float_to_integer_saturates(source, dtype, rounding, target):
    values = np.concatenate([float_edges(dtype), np.array([0.5, -0.5, 2.5, -2.5, 1e5, -1e5], dtype)])
    (found,) = compute(f"cvt.{rounding}.{target}.{source} %o0, %i0;", values, out=[INTEGERS[target]])
    limits = np.iinfo(INTEGERS[target])
    step = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[rounding]
    for x, value in zip(values.tolist(), found.tolist(), strict=True):
        if math.isnan(x):
            right = 0
        elif math.isinf(x):
            right = limits.max if x > 0 else limits.min
        else:
            right = min(max(step(Fraction(x)), limits.min), limits.max)
        assert value == right, x


@pytest.mark.parametrize("target, dtype", [("f32", np.float32), ("f64", np.float64), ("f16", np.float16)])
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
def test_integer_to_float(source, target, dtype):
    values = np.concatenate([integer_edges(INTEGERS[source]), np.array([2**24 + 1, 2**25 + 3, 2049], INTEGERS[source])])
    (found,) = compute(f"cvt.rn.{target}.{source} %o0, %i0;", values, out=[dtype])
    assert found.tolist() == [rounded(Fraction(int(x)), target) for x in values]


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("target", INTEGERS)
def test_integer_to_integer(source, target):
    values = integer_edges(np.int16 if source == "s8" else np.uint16) if source[1:] == "8" else None
    values = integer_edges(INTEGERS[source]) if values is None else values
    low_bits = values.astype(INTEGERS[source])  # 8-bit values are the low bits of a 16-bit register
    wide = {"s8": np.int16, "u8": np.uint16}.get(target, INTEGERS[target])
    body = f"cvt.{target}.{source} %o0, %i0; cvt.sat.{target}.{source} %o1, %i0;"
    plain, saturated = compute(body, values, out=[wide] * 2)
    limits, bits = np.iinfo(INTEGERS[target]), np.iinfo(INTEGERS[target]).bits
    for x, value, other in zip(low_bits.tolist(), plain.tolist(), saturated.tolist(), strict=True):
        wrapped = x & ((1 << bits) - 1)
        assert value == (wrapped - (1 << bits) if limits.min and wrapped >> (bits - 1) else wrapped)
        assert other == min(max(x, limits.min), limits.max)


def test_rounding_to_integral_values():
    x = np.array([0.5, 1.5, -0.5, -1.5, 2.7, -2.7, np.inf, -0.0], np.float32)
    body = "cvt.rni.f32.f32 %o0, %i0; cvt.rzi.f32.f32 %o1, %i0; cvt.rmi.f32.f32 %o2, %i0; cvt.rpi.f32.f32 %o3, %i0;"
    nearest, zero, down, up = compute(body, x, out=[np.float32] * 4)
    assert same(nearest, [0.0, 2.0, -0.0, -2.0, 3.0, -3.0, np.inf, -0.0]).all()
    assert same(zero, [0.0, 1.0, -0.0, -1.0, 2.0, -2.0, np.inf, -0.0]).all()
    assert same(down, [0.0, 1.0, -1.0, -2.0, 2.0, -3.0, np.inf, -0.0]).all()
    assert same(up, [1.0, 2.0, -0.0, -1.0, 3.0, -2.0, np.inf, -0.0]).all()


ORDERED = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["s16", "s32", "u32", "s64", "u64", "b32", "b64"])
def test_integer_comparisons(kind):
    dtype = INTEGERS[kind.replace("b", "u")]
    a, b = grid(integer_edges(dtype), integer_edges(dtype))
    names = ["eq", "ne"] if kind[0] == "b" else list(ORDERED)
    for name in names:
        (found,) = compute(f"setp.{name}.{kind} %p0, %i0, %i1; selp.b32 %o0, 1, 0, %p0;", a, b, out=[np.uint32])
        assert found.tolist() == [int(ORDERED[name](int(x), int(y))) for x, y in zip(a, b, strict=True)]
    if kind[0] == "u":
        for name, other in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
            (found,) = compute(f"setp.{name}.{kind} %p0, %i0, %i1; selp.b32 %o0, 1, 0, %p0;", a, b, out=[np.uint32])
            assert found.tolist() == [int(ORDERED[other](int(x), int(y))) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_float_comparisons(kind):
    """With a NaN ordered comparisons are false and unordered ones true."""
    if kind == "bf16":
        bits = np.array([0, 0x8000, 0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 1], np.uint16)
        a, b = grid(bits, bits)
        values = bf16_values(a), bf16_values(b)
    else:
        dtype = {"f32": np.float32, "f64": np.float64, "f16": np.float16}[kind]
        a, b = values = grid(float_edges(dtype)[::2], float_edges(dtype)[::3])
    for name, operation in ORDERED.items():
        body = f"""setp.{name}.{kind} %p0, %i0, %i1; selp.b32 %o0, 1, 0, %p0;
            setp.{name}u.{kind} %p0, %i0, %i1; selp.b32 %o1, 1, 0, %p0;
            setp.num.{kind} %p0, %i0, %i1; selp.b32 %o2, 1, 0, %p0;
            setp.nan.{kind} %p0, %i0, %i1; selp.b32 %o3, 1, 0, %p0;"""
        found = compute(body, a, b, out=[np.uint32] * 4)
        for i, (x, y) in enumerate(zip(*(part.tolist() for part in values), strict=True)):
            unordered = math.isnan(x) or math.isnan(y)
            right = operation(x, y)
            expected = [right and not unordered, right or unordered, not unordered, unordered]
            assert [bool(part[i]) for part in found] == expected, (name, x, y)


def test_comparison_with_a_predicate_and_two_results():
    a, b = grid(np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    body = """setp.gt.s32 %p3, %i1, 0;
        setp.lt.and.s32 %p0|%p1, %i0, %i1, %p3; selp.b32 %o0, 1, 0, %p0; selp.b32 %o1, 1, 0, %p1;
        setp.lt.or.s32 %p0, %i0, %i1, !%p3; selp.b32 %o2, 1, 0, %p0;
        setp.lt.xor.s32 %p0, %i0, %i1, %p3; selp.b32 %o3, 1, 0, %p0;
        set.lt.u32.s32 %o4, %i0, %i1; set.lt.f32.s32 %o5, %i0, %i1;"""
    found = compute(body, a, b, out=[np.uint32] * 5 + [np.float32])
    less, positive = a < b, b > 0
    right = [less & positive, ~less & positive, less | ~positive, less ^ positive]
    for values, expected in zip(found, right, strict=False):
        assert np.array_equal(values.astype(bool), expected)
    assert np.array_equal(found[4] == 0xFFFFFFFF, less) and np.array_equal(found[5] == 1, less)


def test_predicate_logic():
    a, b = grid(np.arange(2, dtype=np.int32), np.arange(2, dtype=np.int32))
    body = """setp.ne.s32 %p0, %i0, 0; setp.ne.s32 %p1, %i1, 0;
        and.pred %p2, %p0, %p1; or.pred %p3, %p0, %p1; xor.pred %p4, %p0, %p1; not.pred %p5, %p0; mov.pred %p6, %p1;
        selp.b32 %o0, 1, 0, %p2; selp.b32 %o1, 1, 0, %p3; selp.b32 %o2, 1, 0, %p4; selp.b32 %o3, 1, 0, %p5;
        selp.b32 %o4, 1, 0, %p6; @!%p0 mov.b32 %o4, 7;"""
    found = compute(body, a, b, out=[np.int32] * 5)
    right = [a & b, a | b, a ^ b, 1 - a, np.where(a, b, 7)]
    for values, expected in zip(found, right, strict=True):
        assert np.array_equal(values, expected)


def test_select_by_sign():
    a = np.array([-1.0, -0.0, 0.0, 2.0, np.nan], np.float32)
    (found,) = compute("slct.s32.f32 %o0, 1, 2, %i0;", a, out=[np.int32])
    assert found.tolist() == [2, 1, 1, 1, 2]


def test_vector_moves():
    words = np.array([0x0123456789ABCDEF, 0xFEDCBA9876543210], np.uint64)
    body = """mov.b64 {%r1, %r2}, %i0; mov.b32 {%h1, %h2}, %r1; mov.b64 {_, %r3}, %i0;
        mov.b64 %o0, {%r2, %r1}; mov.b32 %o1, {%h2, %h1}; mov.b64 {%h3, %h4, %h5, %h6}, %i0;
        mov.b64 %o2, {%h6, %h5, %h4, %h3}; mov.b32 %o3, %r3;"""
    swapped, half, reversed_, high = compute(body, words, out=[np.uint64, np.uint32, np.uint64, np.uint32])
    assert swapped.tolist() == [0x89ABCDEF01234567, 0x76543210FEDCBA98]
    assert half.tolist() == [0xCDEF89AB, 0x32107654]
    assert reversed_.tolist() == [0xCDEF89AB45670123, 0x32107654BA98FEDC]
    assert high.tolist() == [0x01234567, 0xFEDCBA98]


def test_constants():
    x = np.zeros(1, np.uint32)
    body = """mov.f32 %o0, 0f3FC00000; mov.b32 %o1, -1; mov.u32 %o2, 0x1F; mov.f64 %o3, 0d3FF8000000000000;
        mov.s32 %o4, WARP_SZ; add.f32 %o5, %o0, 0fBF800000; mov.u32 %o6, 010;"""
    found = compute(body, x, out=[np.float32, np.int32, np.uint32, np.float64, np.int32, np.float32, np.uint32])
    assert [values.item() for values in found] == [1.5, -1, 31, 1.5, 32, 0.5, 8]
