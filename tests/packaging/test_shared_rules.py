"""Constants and rules that Python and C++ both state: the tests compile the C++ and compare the numbers.

`tests/kernels/block_causal_attention/test_tiles.py` does the same for the tiles of the attention.
"""

import ctypes
import importlib
import math

import pytest
import torch

from tests.helpers import host_code
from var_kernels.inference import packed_linear, winograd_conv
from var_kernels.native import build

HEADERS = ("cpu/packed_linear.h", "cpu/winograd_conv.h", "nearest_code_centre.h")
# Constants of files that only a CUDA compiler, or a compiler for a single instruction set, accepts.
STATEMENTS = {
    "kNames": "cpu/dispatch.cpp",
    "a": "cpu/winograd_conv.isa.cpp",
    "kLog2E": "cuda/block_causal_attention_backward.cuh",
    "kLog2ERest": "cuda/block_causal_attention_backward.cuh",
    "kSectionBytes": "cuda/block_causal_attention.cu",
    "kMostSlices": "cuda/multi_scale_quantize_backward.cu",
    "kKeyOfMinusInfinity": "cuda/sample_tokens.cuh",
    "kHighestKey": "cuda/sample_tokens.cuh",
}
NUMBERS = (
    "kLinearColumns", "kWinogradColumns", "kWinogradDepth", "kCentreCodes",
    "a", "b", *(name for name in STATEMENTS if name not in ("kNames", "a")), "kLowestKey",
)  # fmt: skip


@pytest.fixture(scope="module")
def cpp(tmp_path_factory):
    """A library with `scheme` and `level`, and with `number`, which returns a constant of C++ by its name."""
    includes = "".join(f'#include "{header}"\n' for header in HEADERS)
    statements = "".join(f"{host_code.constant_statement(path, name)}\n" for name, path in STATEMENTS.items())
    numbers = "".join(f'  if (!std::strcmp(name, "{name}")) return double({name});\n' for name in NUMBERS)
    library = host_code.library(
        f"""
#include <cstring>
{includes}
using namespace var_kernels;
namespace {{
{statements}
}}
extern "C" {{
double number(const char* name) {{
{numbers}  return 0.0 / 0.0;
}}
int scheme(int index, int field) {{
  const WinogradScheme& s = kWinogradSchemes[index];
  return field == 0 ? s.outputs : field == 1 ? s.points : s.scale;
}}
int schemes() {{ return sizeof(kWinogradSchemes) / sizeof(*kWinogradSchemes); }}
const char* level(int index) {{ return index < int(sizeof(kNames) / sizeof(*kNames)) ? kNames[index] : nullptr; }}
}}
""",
        tmp_path_factory.mktemp("shared_rules"),
    )
    library.number.restype, library.level.restype = ctypes.c_double, ctypes.c_char_p
    library.number.argtypes = [ctypes.c_char_p]
    return library


def number(cpp, name: str) -> float:
    value = cpp.number(name.encode())
    assert not math.isnan(value), f"{name} is not among NUMBERS"
    return value


def test_packed_linear(cpp):
    assert packed_linear._COLUMNS == number(cpp, "kLinearColumns")


def test_centre_of_a_codebook(cpp):
    for package in ("reference", "triton"):
        module = importlib.import_module(f"var_kernels.{package}.nearest_code")
        assert module.CENTRE_CODES == number(cpp, "kCentreCodes"), package


def test_winograd_conv(cpp):
    ours = winograd_conv._COLUMNS, winograd_conv._DEPTH
    assert ours == tuple(number(cpp, name) for name in ("kWinogradColumns", "kWinogradDepth"))
    assert len(winograd_conv.SCHEMES) == cpp.schemes()
    for index, scheme in enumerate(winograd_conv.SCHEMES):
        theirs = [cpp.scheme(index, field) for field in range(3)]
        assert [scheme.outputs, len(scheme.filters), scheme.scale] == theirs, scheme.name
    assert winograd_conv._four_outputs.__defaults__ == (number(cpp, "a"), number(cpp, "b"))


def test_widest_head_of_the_attention(cpu):
    # `var_kernels.block_causal_attention` is the function, not the module.
    widest = importlib.import_module("var_kernels.block_causal_attention").MAX_HEAD_DIM
    raw = torch.ops.var_kernels._block_causal_attention
    fits, wider = torch.zeros(1, 1, 1, widest), torch.zeros(1, 1, 1, widest + 1)
    assert raw(fits, fits, fits, [1], 1.0, 0, False)[0].shape == fits.shape
    with pytest.raises(RuntimeError, match=f"q: expected a head dimension from 1 to {widest}, got {widest + 1}"):
        raw(wider, wider, wider, [1], 1.0, 0, False)


def test_names_of_the_isa_levels(cpp):
    names = [level.decode() for level in iter(map(cpp.level, range(99)).__next__, None)]
    assert names == list(build.ISA_LEVELS)


def test_constants_of_cuda_and_triton(cpp):
    pytest.importorskip("triton")
    from var_kernels.triton import block_causal_attention as attention
    from var_kernels.triton import multi_scale_quantize_backward, sample_tokens

    log2_e, rest = (torch.tensor(x.value).float().item() for x in (attention.LOG2_E, attention.LOG2_E_REST))
    assert log2_e == number(cpp, "kLog2E") and rest == number(cpp, "kLog2ERest")
    assert abs(log2_e + rest - math.log2(math.e)) < 1e-15
    assert attention._SECTION_BYTES == number(cpp, "kSectionBytes")
    assert multi_scale_quantize_backward._SLICES == number(cpp, "kMostSlices")
    keys = sample_tokens._LOWEST, sample_tokens._MINUS_INFINITY, sample_tokens._HIGHEST
    theirs = tuple(number(cpp, name) for name in ("kLowestKey", "kKeyOfMinusInfinity", "kHighestKey"))
    assert tuple(key.value for key in keys) == theirs
