"""For the tests of the PTX interpreter: runs a few lines of PTX over arrays, and rounds rationals as IEEE 754 does."""

from fractions import Fraction

import numpy as np

from tools.gpu_emulation.ptx import Memory, parse, run

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<40>, %t<4>;
    .reg .b64 %d<24>;
"""
_NAMES = {1: "h", 2: "h", 4: "r", 8: "d"}


def kernel(body: str, parameters: str = "", declarations: str = "", hints: str = ""):
    """The kernel of a module that has only this one. Its body is `body`, with registers %p, %h, %r, %t and %d."""
    text = f"{HEADER}{declarations}\n.visible .entry k({parameters})\n{hints}\n{{{REGISTERS}{body}\n}}\n"
    return parse(text).kernels["k"]


def launch(body: str, arguments=(), *, parameters="", declarations="", hints="", memory=None, **geometry):
    geometry = {"grid": (1, 1, 1), "threads": (32, 1, 1)} | geometry
    return run(kernel(body, parameters, declarations, hints), arguments, memory=memory or Memory(), **geometry)


def compute(body: str, *inputs: np.ndarray, out) -> list[np.ndarray]:
    """Executes `body` once for each element: inputs in %i0, %i1, ..., results (of the dtypes `out`) in %o0, %o1, ...

    The registers have the width of their arrays' elements (8-bit elements: 16 bits).
    """
    size = inputs[0].size
    lanes = -(-size // 32) * 32
    padded = [np.resize(np.ascontiguousarray(array), lanes) for array in inputs]
    results = [np.zeros(lanes, dtype) for dtype in out]
    memory, lines, addresses = Memory(), [], []
    for number, array in enumerate(padded + results):
        memory.add(f"array{number}", array)
        addresses.append(array.ctypes.data)
        width = array.itemsize
        bits, name = 8 * width, f"%i{number}" if number < len(inputs) else f"%o{number - len(inputs)}"
        lines.append(f".reg .b{max(bits, 16)} {name};")
        lines.append(f"ld.param.u64 %d{number}, [p{number}]; mad.wide.u32 %d{number}, %t0, {width}, %d{number};")
        if number < len(inputs):
            lines.append(f"ld.global.b{bits} {name}, [%d{number}];")
    stores = [f"st.global.b{8 * array.itemsize} [%d{len(inputs) + i}], %o{i};" for i, array in enumerate(results)]
    index = "mov.u32 %t0, %tid.x; mov.u32 %t1, %ctaid.x; mad.lo.u32 %t0, %t1, 32, %t0;"
    text = "\n".join([index, *lines, body, *stores, "ret;"])
    parameters = ", ".join(f".param .u64 p{number}" for number in range(len(addresses)))
    launch(text, addresses, parameters=parameters, memory=memory, grid=(lanes // 32, 1, 1))
    return [array[:size] for array in results]


# (bits of the significand, smallest exponent of the last bit, largest finite exponent)
FORMATS = {"f16": (11, -24, 15), "bf16": (8, -133, 127), "f32": (24, -149, 127), "f64": (53, -1074, 1023)}


def rounded(value: Fraction, form: str) -> float:
    """`value` in the format, to nearest even, as a Python float."""
    digits, lowest, largest = FORMATS[form]
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent += (magnitude >= Fraction(2) ** (exponent + 1)) - (magnitude < Fraction(2) ** exponent)
    unit = max(exponent - digits + 1, lowest)
    scaled = magnitude / Fraction(2) ** unit
    whole = scaled.numerator // scaled.denominator
    rest = scaled - whole
    whole += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1)
    result = whole * Fraction(2) ** unit
    sign = -1.0 if value < 0 else 1.0
    return sign * (float("inf") if result >= Fraction(2) ** (largest + 1) else float(result))


def grid(*axes) -> list[np.ndarray]:
    """All combinations of the elements of the axes, as one array for each axis."""
    return [part.reshape(-1).copy() for part in np.meshgrid(*axes, indexing="ij")]


def float_edges(dtype) -> np.ndarray:
    """Zeros, subnormal and extreme numbers, infinities, NaN, and numbers at rounding ties of narrower formats."""
    info = np.finfo(dtype)
    values = [0.0, 1.0, 1.5, 3.0, 1 / 3, 2.5, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 2.0**-9, 1e-3, 65519.0]
    values += [65520.0, 2.0**-24, 2.0**-25, 2.0**-14, 2.0**31, 2.0**32, 2.0**63, 2147483520.0, 1e30]
    values += [float(info.tiny), float(info.smallest_subnormal), float(info.max), float("inf")]
    with np.errstate(over="ignore", under="ignore"):
        positive = np.array(values, np.float64).astype(dtype)
    return np.concatenate([positive, -positive, np.array([np.nan], dtype)])


def integer_edges(dtype) -> np.ndarray:
    info = np.iinfo(dtype)
    values = [0, 1, 2, 3, 7, 31, 32, 100, info.max, info.max - 1, info.max // 2 + 1, info.max // 3]
    if info.min:
        values += [info.min, info.min + 1, -1, -2, -3, -7, info.min // 3]
    return np.array(values, dtype)


def same(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Equality of values with NaN equal to NaN and -0 different from 0."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    nan = np.isnan(left) & np.isnan(right)
    return nan | ((left == right) & (np.signbit(left) == np.signbit(right)))
