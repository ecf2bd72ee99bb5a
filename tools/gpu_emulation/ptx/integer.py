"""Integer arithmetic, logic and bit fields."""

from __future__ import annotations

import numpy as np

from .binding import DTYPES, INTEGERS, UNTYPED, Binder, Execute, assign, bits_of, elementwise, instruction


@instruction("add", "sub", floating=False)
def _add(b: Binder) -> Execute:
    if b.flag("cc"):
        return _carry(b, carry_in=False, carry_out=True)
    kind = b.type(*INTEGERS, *UNTYPED)
    if b.flag("sat"):
        return _saturating(b, kind)
    return elementwise(b, np.add if b.name == "add" else np.subtract, kind, 2)


def _saturating(b: Binder, kind: str) -> Execute:
    if kind != "s32":
        raise b.error(".sat is defined for .s32 only")
    operation = np.add if b.name == "add" else np.subtract

    def function(x, y):
        exact = operation(x.astype(np.int64), y.astype(np.int64))
        return exact.clip(-(1 << 31), (1 << 31) - 1).astype(np.int32)

    return elementwise(b, function, kind, 2)


@instruction("addc", "subc")
def _addc(b: Binder) -> Execute:
    return _carry(b, carry_in=True, carry_out=b.flag("cc"))


def _carry(b: Binder, carry_in: bool, carry_out: bool) -> Execute:
    """Extended-precision addition and subtraction. The carry of a subtraction is its borrow."""
    b.type("u32", "s32", "b32")
    dest, x, y, carry = b.dest(0, "u32"), b.source(1, "u32"), b.source(2, "u32"), b.machine.carry
    add = b.name.startswith("add")

    def execute(mask):
        wide = x.astype(np.uint64)
        other = y + carry if carry_in else y.astype(np.uint64)
        wide = wide + other if add else wide - other
        np.copyto(dest, wide.astype(np.uint32), where=mask)
        if carry_out:
            np.copyto(carry, (wide >> np.uint64(32)) & np.uint64(1), where=mask)

    return execute


def _high(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The high half of the product."""
    bits = 8 * x.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{x.dtype.kind}{bits // 4}")
        return ((x.astype(wide) * y.astype(wide)) >> wide.type(bits)).astype(x.dtype)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a, b = x.view(np.uint64), y.view(np.uint64)
    middle = (a >> half) * (b & low) + (((a & low) * (b & low)) >> half)
    cross = (a & low) * (b >> half) + (middle & low)
    high = (a >> half) * (b >> half) + (middle >> half) + (cross >> half)
    if x.dtype.kind == "i":
        high = high - np.where(x < 0, b, np.uint64(0)) - np.where(y < 0, a, np.uint64(0))
    return high.view(x.dtype)


@instruction("mul", "mad", "madc", floating=False)
def _multiply(b: Binder) -> Execute:
    kind = b.type(*INTEGERS)
    part = b.one_of(("lo", "hi", "wide"))
    if b.name == "madc" or b.flag("cc"):
        return _multiply_carry(b, kind, part)
    x, y = b.source(1, kind), b.source(2, kind)
    if part != "wide":
        product = np.multiply if part == "lo" else _high
        dest = b.dest(0, kind)
        if b.name == "mul":
            return assign(dest, product, [x, y])
        addend = b.source(3, kind)
        return assign(dest, lambda: product(x, y) + addend, [])
    if bits_of(kind) == 64:
        raise b.error("there is no .wide product of 64 bits")
    wide = f"{kind[0]}{2 * bits_of(kind)}"
    dest, dtype = b.dest(0, wide), DTYPES[wide]
    if b.name == "mul":
        return lambda mask: np.multiply(x, y, out=dest, where=mask, dtype=dtype)
    addend = b.source(3, wide)
    return assign(dest, lambda: np.multiply(x, y, dtype=dtype) + addend, [])


def _multiply_carry(b: Binder, kind: str, part: str) -> Execute:
    if bits_of(kind) != 32 or part == "wide":
        raise b.error("unsupported: carries exist here for 32 bits, .lo and .hi")
    carry_in, carry_out = b.name == "madc", b.name == "mad" or b.flag("cc")
    dest, x, y, z = b.dest(0, "u32"), b.source(1, kind), b.source(2, kind), b.source(3, "u32")
    carry, product = b.machine.carry, np.multiply if part == "lo" else _high

    def execute(mask):
        wide = product(x, y).view(np.uint32).astype(np.uint64) + z
        if carry_in:
            wide = wide + carry
        np.copyto(dest, wide.astype(np.uint32), where=mask)
        if carry_out:
            np.copyto(carry, wide >> np.uint64(32), where=mask)

    return execute


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Divides towards zero. Division by zero gives all ones, as on GPUs; the instruction set does not specify it."""
    zero = y == 0
    divisor = np.where(zero, y.dtype.type(1), y)
    quotient = x // divisor
    if x.dtype.kind == "i":
        # numpy rounds down.
        quotient = quotient + ((quotient * divisor != x) & ((x < 0) != (divisor < 0)))
    return np.where(zero, ~np.zeros_like(x), quotient.astype(x.dtype))


def _remainder(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x - y * (x / y), and x if y is zero."""
    return np.where(y == 0, x, x - _divide(x, y) * y)


@instruction("div", "rem", floating=False)
def _division(b: Binder) -> Execute:
    return elementwise(b, _divide if b.name == "div" else _remainder, b.type(*INTEGERS), 2)


@instruction("min", "max", floating=False)
def _extremum(b: Binder) -> Execute:
    return elementwise(b, np.minimum if b.name == "min" else np.maximum, b.type(*INTEGERS), 2)


@instruction("neg", "abs", floating=False)
def _sign(b: Binder) -> Execute:
    return elementwise(b, np.negative if b.name == "neg" else np.abs, b.type("s16", "s32", "s64"), 1)


@instruction("and", "or", "xor", "not")
def _logic(b: Binder) -> Execute:
    kind = b.type("pred", *UNTYPED)
    if b.name == "not":
        return elementwise(b, np.invert, kind, 1)
    ufunc = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[b.name]
    return elementwise(b, ufunc, kind, 2)


@instruction("shl", "shr")
def _shift(b: Binder) -> Execute:
    kind = b.type(*UNTYPED) if b.name == "shl" else b.type(*UNTYPED, *INTEGERS)
    bits, dtype = bits_of(kind), DTYPES[kind]
    dest, x, amount = b.dest(0, kind), b.source(1, kind), b.source(2, "u32")
    ufunc = np.left_shift if b.name == "shl" else np.right_shift
    if amount.strides == (0,) and amount[0] < bits:
        return assign(dest, ufunc, [x, np.broadcast_to(dtype.type(amount[0]), x.shape)])

    def shifted():
        # Amounts beyond the width shift all bits out, which leaves zeros or copies of the sign.
        inside = ufunc(x, np.minimum(amount, np.uint32(bits - 1)).astype(dtype))
        return inside if dtype.kind == "i" else np.where(amount < bits, inside, dtype.type(0))

    return assign(dest, shifted, [])


@instruction("shf")
def _funnel(b: Binder) -> Execute:
    b.type("b32")
    left, wrap = b.one_of(("l", "r")) == "l", b.one_of(("wrap", "clamp")) == "wrap"
    low, high, amount = (b.source(i, "u32") for i in (1, 2, 3))

    def shifted():
        count = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return ((both << count) >> np.uint64(32) if left else both >> count).astype(np.uint32)

    return assign(b.dest(0, "u32"), shifted, [])


@instruction("bfe")
def _extract(b: Binder) -> Execute:
    kind = b.type("u32", "s32", "u64", "s64")
    bits, dtype = bits_of(kind), DTYPES[kind]
    x, start, count = b.source(1, kind), b.source(2, "u32"), b.source(3, "u32")

    def extracted():
        position = (start & np.uint32(255)).astype(np.int64)
        length = (count & np.uint32(255)).astype(np.int64)
        # The field ends at the top of the word. Bits beyond it are zeros or copies of the sign.
        unused = np.clip(bits - position - length, 0, bits - 1)
        field = (x << unused.astype(dtype)) >> np.minimum(unused + position, bits - 1).astype(dtype)
        beyond = position >= bits
        fill = x >> dtype.type(bits - 1) if dtype.kind == "i" else dtype.type(0)
        return np.where(length == 0, dtype.type(0), np.where(beyond, fill, field))

    return assign(b.dest(0, kind), extracted, [])


@instruction("bfi")
def _insert(b: Binder) -> Execute:
    kind = b.type("b32", "b64")
    bits, dtype = bits_of(kind), DTYPES[kind]
    field, base = b.source(1, kind), b.source(2, kind)
    start, count = b.source(3, "u32"), b.source(4, "u32")

    def inserted():
        position, length = start & np.uint32(255), count & np.uint32(255)
        ones = np.where(
            length >= bits, ~dtype.type(0), (dtype.type(1) << (length % bits).astype(dtype)) - dtype.type(1)
        )
        shift = np.minimum(position, bits - 1).astype(dtype)
        where = np.where(position < bits, ones << shift, dtype.type(0))
        return (base & ~where) | ((field << shift) & where)

    return assign(b.dest(0, kind), inserted, [])


@instruction("lop3")
def _lop3(b: Binder) -> Execute:
    b.type("b32")
    inputs = [b.source(i, "b32") for i in (1, 2, 3)]
    table = int(b.source(4, "u32")[0])

    def looked_up():
        result = np.zeros(b.machine.lanes, np.uint32)
        for row in range(8):
            if table >> row & 1:
                term = ~np.uint32(0)
                for bit, x in zip((4, 2, 1), inputs, strict=True):
                    term = term & (x if row & bit else ~x)
                result |= term
        return result

    return assign(b.dest(0, "b32"), looked_up, [])


@instruction("prmt")
def _permute(b: Binder) -> Execute:
    b.type("b32")
    low, high, selector = (b.source(i, "b32") for i in (1, 2, 3))

    def permuted():
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        result = np.zeros(low.size, np.uint32)
        for i in range(4):
            choice = (selector >> np.uint32(4 * i)) & np.uint32(15)
            place = (choice & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            byte = ((both >> place) & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
            result |= np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * i)
        return result

    return assign(b.dest(0, "b32"), permuted, [])


@instruction("bfind")
def _bfind(b: Binder) -> Execute:
    """The highest bit that differs from the sign, or all ones if there is none. .shiftamt: its distance to the top."""
    kind = b.type("u32", "s32", "u64", "s64")
    bits, from_top = bits_of(kind), b.flag("shiftamt")

    def find(x):
        word = (x ^ (x >> x.dtype.type(bits - 1)) if x.dtype.kind == "i" else x).view(f"u{bits // 8}")
        digits = np.unpackbits(word.view(np.uint8).reshape(-1, bits // 8), axis=1, bitorder="little")[:, ::-1]
        distance = digits.argmax(1)
        position = distance if from_top else bits - 1 - distance
        return np.where(word == 0, 0xFFFFFFFF, position).astype(np.uint32)

    return assign(b.dest(0, "u32"), find, [b.source(1, kind)])


@instruction("popc", "clz", "brev")
def _bits(b: Binder) -> Execute:
    kind = b.type("b32", "b64")
    size = bits_of(kind)

    def digits(x):
        return np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(-1, size // 8), axis=1, bitorder="little")

    if b.name == "brev":
        return elementwise(
            b, lambda x: np.packbits(digits(x)[:, ::-1], axis=1, bitorder="little").view(x.dtype)[:, 0], kind, 1
        )

    def count(x):
        bits = digits(x)
        if b.name == "popc":
            return bits.sum(1, dtype=np.uint32)
        return np.where(bits.any(1), bits[:, ::-1].argmax(1), size).astype(np.uint32)

    return elementwise(b, count, kind, 1, "b32")
