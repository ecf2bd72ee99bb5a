"""Each instruction of the PTX interpreter is compared with Python's integers and rationals."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.helpers.ptx_snippets import compute, float_edges, grid, integer_edges, rounded, same

SIGNED = {"s16": np.int16, "s32": np.int32, "s64": np.int64}
UNSIGNED = {"u16": np.uint16, "u32": np.uint32, "u64": np.uint64}
INTEGERS = SIGNED | UNSIGNED


def wrap(value: int, dtype) -> int:
    bits = 8 * np.dtype(dtype).itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if np.dtype(dtype).kind == "i" and value >> (bits - 1) else value


def quotient(a: int, b: int) -> int:
    return -1 if b == 0 else (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b, n: a + b,
    "sub": lambda a, b, n: a - b,
    "mul.lo": lambda a, b, n: a * b,
    "mul.hi": lambda a, b, n: (a * b) >> n,
    "min": lambda a, b, n: min(a, b),
    "max": lambda a, b, n: max(a, b),
    "div": lambda a, b, n: quotient(a, b),
    "rem": lambda a, b, n: a if b == 0 else a - b * quotient(a, b),
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", BINARY)
def test_integer_arithmetic(name, kind):
    dtype = INTEGERS[kind]
    a, b = grid(integer_edges(dtype), integer_edges(dtype))
    (found,) = compute(f"{name}.{kind} %o0, %i0, %i1;", a, b, out=[dtype])
    bits = 8 * np.dtype(dtype).itemsize
    expected = [wrap(BINARY[name](int(x), int(y), bits), dtype) for x, y in zip(a, b, strict=True)]
    assert found.tolist() == expected


@pytest.mark.parametrize("kind, wide", [("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")])
def test_wide_products(kind, wide):
    dtype, double = INTEGERS[kind], INTEGERS[wide]
    a, b, c = grid(integer_edges(dtype), integer_edges(dtype), integer_edges(double)[:5])
    body = f"mul.wide.{kind} %o0, %i0, %i1; mad.wide.{kind} %o1, %i0, %i1, %i2;"
    product, summed = compute(body, a, b, c, out=[double, double])
    triples = [tuple(map(int, row)) for row in zip(a, b, c, strict=True)]
    assert product.tolist() == [x * y for x, y, _ in triples]
    assert summed.tolist() == [wrap(x * y + z, double) for x, y, z in triples]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_multiply_add(kind):
    dtype = INTEGERS[kind]
    a, b, c = grid(*[integer_edges(dtype)[::2]] * 3)
    body = f"mad.lo.{kind} %o0, %i0, %i1, %i2; mad.hi.{kind} %o1, %i0, %i1, %i2;"
    low, high = compute(body, a, b, c, out=[dtype, dtype])
    bits = 8 * np.dtype(dtype).itemsize
    triples = [tuple(map(int, row)) for row in zip(a, b, c, strict=True)]
    assert low.tolist() == [wrap(x * y + z, dtype) for x, y, z in triples]
    assert high.tolist() == [wrap(((x * y) >> bits) + z, dtype) for x, y, z in triples]


def test_saturating_addition():
    a, b = grid(integer_edges(np.int32), integer_edges(np.int32))
    found = compute("add.sat.s32 %o0, %i0, %i1; sub.sat.s32 %o1, %i0, %i1;", a, b, out=[np.int32] * 2)
    exact = [a.astype(np.int64) + b, a.astype(np.int64) - b]
    for values, expected in zip(found, exact, strict=True):
        assert values.tolist() == expected.clip(-(2**31), 2**31 - 1).tolist()


def test_carries():
    a, b = grid(integer_edges(np.uint64), integer_edges(np.uint64))
    body = """
        mov.b64 {%r1, %r2}, %i0; mov.b64 {%r3, %r4}, %i1;
        add.cc.u32 %r5, %r1, %r3; addc.u32 %r6, %r2, %r4; mov.b64 %o0, {%r5, %r6};
        sub.cc.u32 %r5, %r1, %r3; subc.u32 %r6, %r2, %r4; mov.b64 %o1, {%r5, %r6};
        mad.lo.cc.u32 %r5, %r1, %r3, %r4; madc.hi.u32 %r6, %r1, %r3, 0; mov.b64 %o2, {%r5, %r6};"""
    total, difference, product = compute(body, a, b, out=[np.uint64] * 3)
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    assert total.tolist() == [wrap(x + y, np.uint64) for x, y in pairs]
    assert difference.tolist() == [wrap(x - y, np.uint64) for x, y in pairs]
    low = 2**32 - 1
    assert product.tolist() == [wrap((x & low) * (y & low) + (y >> 32), np.uint64) for x, y in pairs]


@pytest.mark.parametrize("kind", INTEGERS)
def test_shifts_by_any_amount(kind):
    dtype = INTEGERS[kind]
    bits = 8 * np.dtype(dtype).itemsize
    a, n = grid(integer_edges(dtype), np.array([0, 1, 7, 15, 16, 31, 32, 33, 63, 64, 200, 2**32 - 1], np.uint32))
    left, right = compute(f"shl.b{bits} %o0, %i0, %i1; shr.{kind} %o1, %i0, %i1;", a, n, out=[dtype] * 2)
    pairs = [(int(x), min(int(y), bits)) for x, y in zip(a, n, strict=True)]
    assert left.tolist() == [wrap(x << y, dtype) for x, y in pairs]
    assert right.tolist() == [x >> y for x, y in pairs]
    (fixed,) = compute(f"shr.{kind} %o0, %i0, {bits};", a, out=[dtype])
    assert fixed.tolist() == [x >> bits for x, _ in pairs]


@pytest.mark.parametrize("direction", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(direction, mode):
    low, high, n = grid(*[integer_edges(np.uint32)[::2]] * 2, np.array([0, 1, 31, 32, 33, 40], np.uint32))
    (found,) = compute(f"shf.{direction}.{mode}.b32 %o0, %i0, %i1, %i2;", low, high, n, out=[np.uint32])
    expected = []
    for x, y, amount in zip(low.tolist(), high.tolist(), n.tolist(), strict=True):
        count = amount % 32 if mode == "wrap" else min(amount, 32)
        both = y << 32 | x
        expected.append((both << count >> 32 if direction == "l" else both >> count) & 0xFFFFFFFF)
    assert found.tolist() == expected


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_field_extract(kind):
    dtype = INTEGERS[kind]
    bits = 8 * np.dtype(dtype).itemsize
    counts = np.array([0, 1, 5, 8, 31, 32, 33, 63, 64, 100, 255], np.uint32)
    a, start, count = grid(integer_edges(dtype), counts, counts)
    (found,) = compute(f"bfe.{kind} %o0, %i0, %i1, %i2;", a, start, count, out=[dtype])
    expected = []
    for x, first, length in zip(a.tolist(), start.tolist(), count.tolist(), strict=True):
        # The instruction set defines it bit by bit.
        signed = kind[0] == "s"
        sign = 0 if not signed or length == 0 else (x >> min(first + length - 1, bits - 1)) & 1
        value = 0
        for i in range(bits):
            bit = (x >> (first + i)) & 1 if i < length and first + i < bits else sign
            value |= bit << i
        expected.append(wrap(value, dtype))
    assert found.tolist() == expected


@pytest.mark.parametrize("bits, dtype", [(32, np.uint32), (64, np.uint64)])
def test_bit_field_insert(bits, dtype):
    counts = np.array([0, 1, 8, 31, 32, 63, 64, 200], np.uint32)
    a, b, start, count = grid(integer_edges(dtype)[::2], integer_edges(dtype)[::3], counts, counts)
    (found,) = compute(f"bfi.b{bits} %o0, %i0, %i1, %i2, %i3;", a, b, start, count, out=[dtype])
    expected = []
    for x, y, first, length in zip(a.tolist(), b.tolist(), start.tolist(), count.tolist(), strict=True):
        for i in range(length):
            if first + i < bits:
                y = y & ~(1 << (first + i)) | ((x >> i & 1) << (first + i))
        expected.append(y)
    assert found.tolist() == expected


def test_bit_logic():
    a, b, c = grid(*[integer_edges(np.uint32)[::2]] * 3)
    body = """and.b32 %o0, %i0, %i1; or.b32 %o1, %i0, %i1; xor.b32 %o2, %i0, %i1; not.b32 %o3, %i0;
        lop3.b32 %o4, %i0, %i1, %i2, 0xEA; lop3.b32 %o5, %i0, %i1, %i2, 0x96; popc.b32 %o6, %i0; clz.b32 %o7, %i0;
        brev.b32 %o8, %i0;"""
    found = compute(body, a, b, c, out=[np.uint32] * 9)
    expected = [a & b, a | b, a ^ b, ~a, (a & b) | c, a ^ b ^ c]
    expected.append([int(x).bit_count() for x in a])
    expected.append([32 - int(x).bit_length() for x in a])
    expected.append([int(f"{int(x):032b}"[::-1], 2) for x in a])
    for values, right in zip(found, expected, strict=True):
        assert np.array_equal(values, right)
    wide = integer_edges(np.uint64)
    found = compute("popc.b64 %o0, %i0; clz.b64 %o1, %i0;", wide, out=[np.uint32] * 2)
    assert found[0].tolist() == [int(x).bit_count() for x in wide]
    assert found[1].tolist() == [64 - int(x).bit_length() for x in wide]


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_highest_bit(kind):
    values = integer_edges(INTEGERS[kind])
    body = f"bfind.{kind} %o0, %i0; bfind.shiftamt.{kind} %o1, %i0;"
    position, shift = compute(body, values, out=[np.uint32] * 2)
    bits = 8 * values.itemsize
    lengths = [(int(x) if x >= 0 else ~int(x)).bit_length() for x in values]
    assert position.tolist() == [n - 1 if n else 2**32 - 1 for n in lengths]
    assert shift.tolist() == [bits - n if n else 2**32 - 1 for n in lengths]


def test_permute_bytes():
    a, b, selector = grid(
        np.array([0x83028100, 0x00FF7F80], np.uint32),
        np.array([0x07060504, 0x91A2B3C4], np.uint32),
        np.array([0x3210, 0x7654, 0x5410, 0x0123, 0xFEDC, 0xBA98, 0x7632, 0x000F], np.uint32),
    )
    (found,) = compute("prmt.b32 %o0, %i0, %i1, %i2;", a, b, selector, out=[np.uint32])
    expected = []
    for x, y, s in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True):
        data = x.to_bytes(4, "little") + y.to_bytes(4, "little")
        picks = [(s >> 4 * i) & 15 for i in range(4)]
        picked = [data[p & 7] if p < 8 else (255 if data[p & 7] & 128 else 0) for p in picks]
        expected.append(int.from_bytes(bytes(picked), "little"))
    assert found.tolist() == expected


def test_sign():
    a = integer_edges(np.int32)
    negative, absolute = compute("neg.s32 %o0, %i0; abs.s32 %o1, %i0;", a, out=[np.int32] * 2)
    assert negative.tolist() == [wrap(-int(x), np.int32) for x in a]
    assert absolute.tolist() == [wrap(abs(int(x)), np.int32) for x in a]
    x = np.array([0x00000000, 0x80000000, 0x7FC00001, 0xFF800000, 0x00000001], np.uint32)
    negative, absolute = compute("neg.f32 %o0, %i0; abs.f32 %o1, %i0;", x, out=[np.uint32] * 2)
    assert negative.tolist() == (x ^ np.uint32(1 << 31)).tolist()
    assert absolute.tolist() == (x & np.uint32(2**31 - 1)).tolist()


# ---- Floating point


def exact(operation, *values: float):
    """The rational result, or None where an operand is not finite."""
    if not all(map(math.isfinite, values)):
        return None
    return operation(*map(Fraction, values))


FLOAT_BINARY = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}


@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_float_arithmetic_rounds_once(kind, dtype):
    a, b = grid(float_edges(dtype), float_edges(dtype))
    body = (
        f"add.rn.{kind} %o0, %i0, %i1; sub.{kind} %o1, %i0, %i1; mul.{kind} %o2, %i0, %i1; div.rn.{kind} %o3, %i0, %i1;"
    )
    results = compute(body, a, b, out=[dtype] * 4)
    operations = [*FLOAT_BINARY.values(), lambda x, y: x / y if y else None]
    with np.errstate(all="ignore"):
        special = [a + b, a - b, a * b, a / b]
    for found, operation, other in zip(results, operations, special, strict=True):
        for x, y, value, fallback in zip(a.tolist(), b.tolist(), found.tolist(), other.tolist(), strict=True):
            right = exact(operation, x, y)
            # Where a rule gives zero, infinity or NaN, IEEE hardware is the reference for the sign.
            expected = rounded(right, kind) if right else fallback
            assert same(value, expected) or (expected == 0 and value == 0), (x, y, value, expected)


def fma_cases(dtype) -> list[np.ndarray]:
    """Extreme values, random numbers, and sums next to the middle between two f32 numbers."""
    random = np.random.default_rng(0)
    a, b, c = (random.standard_normal(400).astype(dtype) for _ in range(3))
    one, tiny = dtype(1), dtype(2.0**-60)
    ties = np.array([one + dtype(2.0**-12), dtype(2.0**-24), -dtype(2.0**-24), dtype(2.0**-25) * 3], dtype)
    addends = np.array([one, one + dtype(2.0**-23), dtype(2.0**-60), -tiny, dtype(2.0**30)], dtype)
    edges = grid(ties, np.array([one, -one, one + dtype(2.0**-23)], dtype), addends)
    specials = grid(float_edges(dtype)[::3], float_edges(dtype)[::4], float_edges(dtype)[::5])
    return [np.concatenate(parts) for parts in zip((a, b, c), edges, specials, strict=True)]


@pytest.mark.parametrize("kind, dtype", [("f32", np.float32), ("f64", np.float64)])
def test_fma_rounds_once(kind, dtype):
    a, b, c = fma_cases(dtype)
    (found,) = compute(f"fma.rn.{kind} %o0, %i0, %i1, %i2;", a, b, c, out=[dtype])
    smallest = float(np.finfo(dtype).tiny)
    for x, y, z, value in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
        right = exact(lambda p, q, r: p * q + r, x, y, z)
        if right is None:
            assert not math.isfinite(value)
        elif abs(right) >= smallest or kind == "f64":  # below the normal range f32 sums may be rounded twice
            assert value == rounded(right, kind), (x, y, z)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_arithmetic_rounds_once(kind):
    random = np.random.default_rng(1)
    bits = random.integers(0, 2**16, (3, 2000)).astype(np.uint16)
    bits[:, :6] = [0, 0x8000, 1, 0x3F80, 0x3C00, 0x7BFF]
    body = f"add.rn.{kind} %o0, %i0, %i1; mul.rn.{kind} %o1, %i0, %i1; fma.rn.{kind} %o2, %i0, %i1, %i2;"
    found = [decode(values, kind) for values in compute(body, *bits, out=[np.uint16] * 3)]
    operations = [lambda x, y, z: x + y, lambda x, y, z: x * y, lambda x, y, z: x * y + z]
    triples = list(zip(*(decode(row, kind).tolist() for row in bits), strict=True))
    for values, operation in zip(found, operations, strict=True):
        for triple, value in zip(triples, values.tolist(), strict=True):
            right = exact(operation, *triple)
            assert right is None or value == rounded(right, kind), triple


def towards(value: Fraction, rounding: str) -> float:
    """`value` in f32 with a directed rounding."""
    nearest = np.float32(rounded(value, "f32"))
    down = rounding == "rm" or (rounding == "rz" and value > 0)
    beyond = nearest > value if down else nearest < value
    with np.errstate(over="ignore"):
        return float(np.nextafter(nearest, np.float32(-np.inf if down else np.inf)) if beyond else nearest)


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
def test_directed_roundings(rounding):
    a, b, c = fma_cases(np.float32)
    body = f"add.{rounding}.f32 %o0, %i0, %i1; sub.{rounding}.f32 %o1, %i0, %i1; mul.{rounding}.f32 %o2, %i0, %i1;"
    results = compute(body + f"fma.{rounding}.f32 %o3, %i0, %i1, %i2;", a, b, c, out=[np.float32] * 4)
    for found, operation in zip(results, [*FLOAT_BINARY.values(), lambda p, q, r: p * q + r], strict=True):
        for x, y, z, value in zip(a.tolist(), b.tolist(), c.tolist(), found.tolist(), strict=True):
            right = exact(operation, x, y, z) if operation.__code__.co_argcount == 3 else exact(operation, x, y)
            assert right is None or value == towards(right, rounding), (x, y, z)


def decode(bits: np.ndarray, kind: str) -> np.ndarray:
    """f16 or bf16 bits as f64."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def test_pairs_are_two_halves():
    random = np.random.default_rng(2)
    a, b = random.standard_normal((2, 64)).astype(np.float16)
    x, y = a.view(np.uint32), b.view(np.uint32)
    (found,) = compute("mul.f16x2 %o0, %i0, %i1;", x, y, out=[np.uint32])
    assert np.array_equal(found.view(np.float16), a * b)


@pytest.mark.parametrize("name", ["min", "max"])
def test_minimum_and_maximum(name):
    a, b = grid(float_edges(np.float32), float_edges(np.float32))
    plain, strict = compute(f"{name}.f32 %o0, %i0, %i1; {name}.NaN.f32 %o1, %i0, %i1;", a, b, out=[np.float32] * 2)
    choose = min if name == "min" else max
    for x, y, value, other in zip(a.tolist(), b.tolist(), plain.tolist(), strict.tolist(), strict=True):
        if math.isnan(x) or math.isnan(y):
            assert same(value, y if math.isnan(x) else x) and math.isnan(other)
        else:
            expected = choose((x, y), key=lambda v: (v, math.copysign(1, v)))
            assert same(value, expected) and same(other, expected), (x, y)
    canonical = plain.view(np.uint32)[np.isnan(a) & np.isnan(b)]
    assert (canonical == 0x7FFFFFFF).all()


def test_functions():
    positive = np.abs(float_edges(np.float32))
    values = np.concatenate([positive, -positive])
    body = """ex2.approx.f32 %o0, %i0; lg2.approx.f32 %o1, %i0; sqrt.rn.f32 %o2, %i0; rsqrt.approx.f32 %o3, %i0;
        rcp.rn.f32 %o4, %i0; tanh.approx.f32 %o5, %i0; div.full.f32 %o6, 0f40400000, %i0;"""
    found = compute(body, values, out=[np.float32] * 7)
    x = values.astype(np.float64)
    with np.errstate(all="ignore"):
        expected = [np.exp2(x), np.log2(x), np.sqrt(x), 1 / np.sqrt(x), 1 / x, np.tanh(x), 3 / x]
        for result, right in zip(found, expected, strict=True):
            assert same(result, right.astype(np.float32)).all()


def test_flush_to_zero():
    tiny = np.float32(2.0**-140)
    x = np.array([tiny, -tiny, 1.0], np.float32)
    kept, flushed, result = compute(
        "add.f32 %o0, %i0, 0f00000000; add.ftz.f32 %o1, %i0, 0f80000000; mul.ftz.f32 %o2, 0f00800000, 0f3F000000;",
        x, out=[np.float32] * 3,
    )  # fmt: skip
    assert kept.tolist() == x.tolist()
    assert same(flushed, [0.0, -0.0, 1.0]).all() and not result.any()
