"""PackedLinear, packed for our kernel, packed for oneDNN, and not packed: accuracy against fp64, layouts, arguments."""

import pytest
import torch
import torch.nn.functional as F

from var_kernels import PackedLinear, backends
from var_kernels.inference import packing
from var_kernels.inference.packing import kernel_unavailable_reason
from var_kernels.native import load
from var_kernels.testing import assert_accurate, randn, stated_order

DTYPES = (torch.float32, torch.bfloat16)
# Rows, inputs, outputs. Rows straddle tiles of 8, 4, 2 and 1 and blocks of 240; inputs straddle products of 512 in fp32
# and 1024 in bf16; outputs straddle strips of 48, 32 and 16 and groups of 512.
SHAPES = [(1, 1, 1), (2, 64, 192), (7, 34, 65), (130, 96, 40), (15, 33, 48), (8, 512, 64), (3, 513, 16), (9, 1024, 560),
          (5, 2050, 33), (241, 130, 100), (490, 40, 528)]  # fmt: skip


def expected(x, weight, bias, gelu):
    y = F.linear(x, weight, bias)
    return F.gelu(y, approximate="tanh") if gelu else y


def problem(rows, inner, outer, dtype=torch.float32):
    weight = (randn(outer, inner, seed=2) / inner**0.5).to(dtype)
    return randn(rows, inner, seed=1, dtype=dtype), weight, randn(outer, seed=3)


@pytest.fixture(params=["ours", "onednn", "unpacked"])
def make(request, monkeypatch):
    """`PackedLinear`, packed for our kernel where there is one, for oneDNN, or not at all."""
    if request.param == "onednn":
        monkeypatch.setattr(packing, "kernel_unavailable_reason", lambda dtype: "oneDNN is asked for")
    backend = "reference" if request.param == "unpacked" else "auto"
    return lambda *args, **options: PackedLinear(*args, **options, backend=backend)


def ours(dtype, *tensors, **options):
    """A layer that our kernel serves; skips the test if this machine has no kernel."""
    if (reason := kernel_unavailable_reason(dtype)) is not None:
        pytest.skip(reason)
    layer = PackedLinear(*tensors, **options)
    assert layer.backend == "cpu" and layer.packed_by_us
    return layer


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, gelu, make):
    x, weight, bias = problem(*shape, dtype)
    rows, inner, outer = shape
    layer = make(weight, bias, gelu=gelu)
    exact = expected(x.double(), weight.double(), bias.to(dtype).double(), gelu)
    with stated_order():
        plain, plain_without_bias = expected(x, weight, bias.to(dtype), gelu), F.linear(x, weight)
    assert_accurate(layer(x), plain, exact, name="y")
    leading = layer(x.view(1, rows, 1, inner))
    assert torch.equal(leading.view(rows, outer), layer(x)) and leading.shape == (1, rows, 1, outer)
    assert_accurate(make(weight)(x), plain_without_bias, F.linear(x.double(), weight.double()), name="y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_far_from_zero(dtype):
    x = torch.tensor([-1e30, -60.0, -11.0, -0.0, 1e-30, 60.0, 1e30, torch.inf, torch.nan], dtype=dtype)
    x = torch.stack((x, torch.zeros_like(x)), dim=1)
    weight = torch.tensor([[1.0, 0.0]], dtype=dtype)
    found, want = ours(dtype, weight, gelu=True)(x), F.gelu(x[:, :1].double(), approximate="tanh").to(dtype)
    torch.testing.assert_close(found, want, rtol=torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others_nor_on_threads(dtype, restore_threads):
    x, weight, bias = problem(250, 1026, 600, dtype)
    layer = ours(dtype, weight, bias, gelu=True)
    want = layer(x)
    for rows in (slice(0, 1), slice(3, 17), slice(100, 249)):
        assert torch.equal(layer(x[rows]), want[rows])
    x[7, 3] = torch.nan
    others = torch.arange(250) != 7
    assert torch.equal(layer(x)[others], want[others]) and layer(x)[7].isnan().all()
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(layer(x)[others], want[others])


def test_weights_are_converted(make):
    x, weight, bias = problem(9, 64, 80, torch.bfloat16)
    wide, bias = randn(80, 64, seed=5, dtype=torch.float64), bias.double()
    layer = make(wide, bias, dtype=torch.bfloat16)
    assert layer.dtype == torch.bfloat16
    assert torch.equal(layer(x), make(wide.bfloat16(), bias.bfloat16())(x))


def test_layouts():
    x, weight, bias = problem(6, 32, 20)
    wide = torch.full((6, 40), torch.nan)
    wide[:, :32] = x
    layer = PackedLinear(weight, bias)
    for same in (wide[:, :32], x.t().contiguous().t(), x.unsqueeze(1).expand(6, 2, 32)[:, 1]):
        assert torch.equal(layer(same), layer(x))
    assert torch.equal(PackedLinear(weight.t().contiguous().t(), bias)(x), layer(x))
    assert layer(x[:0]).shape == (0, 20) and layer(x.view(2, 3, 32)[:, :0]).shape == (2, 0, 20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backend_and_bytes_of_a_layer(dtype):
    for shape in ((20, 10), (1024, 64)):
        weight = torch.zeros(shape, dtype=dtype)
        layer = PackedLinear(weight)
        assert layer.backend == backends.resolve("packed_linear", "auto", "cpu", dtype)
        padded = -(-shape[0] // 16) * 16 if layer.packed_by_us else shape[0]
        assert layer.nbytes == (padded * shape[1] * dtype.itemsize if layer.backend == "cpu" else 0)
        assert PackedLinear(weight, backend="reference").nbytes == 0
        assert PackedLinear(weight.double(), dtype=dtype, backend="reference").nbytes == weight.nbytes
        assert PackedLinear(weight.double(), dtype=dtype).nbytes == (layer.nbytes or weight.nbytes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_leaves_no_temporaries_with_malloc(dtype, peak_growth):
    if (reason := kernel_unavailable_reason(dtype)) is not None:
        pytest.skip(reason)
    preparation = f"""
import torch
from var.generation.memory import keep_freed_memory
from var_kernels.inference.packed_linear import PackedLinear
keep_freed_memory()
weights = [torch.ones(1024, 4096) for _ in range(8)]
PackedLinear(weights[0][:16], dtype={dtype})"""
    grown = peak_growth(preparation, f"kept = [PackedLinear(w, torch.zeros(1024), dtype={dtype}) for w in weights]")
    held = 8 * 1024 * 4096 * dtype.itemsize
    assert 0.9 * held < grown < 1.15 * held


@pytest.mark.skipif(not load.native_library().available, reason="no native library")
def test_an_odd_number_of_bf16_inputs_is_padded(monkeypatch):
    """Our kernel reads inputs in pairs. An odd number once failed where oneDNN, which served it, is missing."""
    monkeypatch.setattr(packing, "kernel_unavailable_reason", lambda dtype: None)
    if load.native_library().isa not in ("avx512_bf16", "amx"):
        pytest.skip("this instruction set has no product of bfloat16")
    x, weight, bias = problem(4, 33, 20, torch.bfloat16)
    layer = PackedLinear(weight, bias)
    assert layer.packed_by_us and layer.nbytes == 32 * 34 * 2
    exact = expected(x.double(), weight.double(), bias.bfloat16().double(), False)
    assert_accurate(layer(x), expected(x, weight, bias.bfloat16(), False), exact, name="y")


@pytest.mark.skipif(not load.native_library().available, reason="no native library")
def test_a_named_backend_is_that_backend_or_an_error(monkeypatch):
    weight, x = randn(20, 10, seed=1), randn(3, 10, seed=2)
    plain = F.gelu(F.linear(x, weight), approximate="tanh")
    assert torch.equal(PackedLinear(weight, gelu=True, backend="reference")(x), plain)
    with pytest.raises(ValueError, match="'cuda' cannot serve packed_linear on cpu"):
        PackedLinear(weight, backend="cuda")
    with pytest.raises(ValueError, match="'cpu' cannot serve .* take torch.float16; expected one of auto, reference"):
        PackedLinear(weight, dtype=torch.float16, backend="cpu")
    monkeypatch.setattr(packing, "kernel_unavailable_reason", lambda dtype: "none of ours")
    monkeypatch.setattr(packing, "_no_onednn", lambda: "no oneDNN")
    with pytest.raises(ValueError, match="'cpu' cannot serve packed_linear .*: no oneDNN; expected one of auto, ref"):
        PackedLinear(weight, backend="cpu")
    layer = PackedLinear(weight, gelu=True)
    assert layer.backend == "reference" and torch.equal(layer(x), plain)
    assert packing.packer(torch.float32) == "F.linear (no oneDNN)"


def test_without_the_library_onednn_serves(monkeypatch):
    monkeypatch.setattr(load, "native_library", lambda: load.NativeStatus(False, "no library"))
    if (reason := packing.unavailable_reason(torch.float32)) is not None:
        pytest.skip(reason)
    weight, x = randn(20, 10, seed=1), randn(3, 10, seed=2)
    layer = PackedLinear(weight)
    assert layer.backend == "cpu" and not layer.packed_by_us
    torch.testing.assert_close(layer(x), F.linear(x, weight))
    assert packing.packer(torch.float32).startswith("oneDNN (our kernel: the native library is not available")



def strip_widths(columns):
    """The widths of the strips into which columns are divided, as packed_linear.h says."""
    widths = []
    for begin in range(0, columns, 512):
        left = min(512, columns - begin)
        while left:
            widths.append(32 if left == 64 else min(48, left))
            left -= widths[-1]
    return widths


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (16, 16), (64, 33), (48, 15), (65, 34), (560, 31), (1100, 130), (576, 7)], ids=str
)
def test_the_order_of_packed_weights(shape, dtype):
    if (reason := kernel_unavailable_reason(dtype)) is not None:
        pytest.skip(reason)
    together = 2 if dtype == torch.bfloat16 else 1
    for source in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = randn(*shape, seed=1).to(source)
        padded = F.pad(weight.to(dtype), (0, -shape[1] % together, 0, -shape[0] % 16))
        strips = padded.split(strip_widths(len(padded)))
        expected = torch.cat([strip.unflatten(1, (-1, together)).transpose(0, 1).flatten() for strip in strips])
        assert torch.equal(PackedLinear(weight, dtype=dtype)._weight, expected), source
        not_dense = weight.t().contiguous().t()
        assert torch.equal(PackedLinear(not_dense, dtype=dtype)._weight, expected), source


@pytest.mark.parametrize(
    ("weight", "packed", "match"),
    [
        (torch.zeros(20, 8).half(), torch.zeros(256), "weight: expected float32 or bfloat16"),
        (torch.zeros(20, 8), torch.zeros(256).half(), "packed: expected float32 or bfloat16"),
        (torch.zeros(8, 20).t(), torch.zeros(256), "weight: expected a dense tensor"),
        (torch.zeros(20, 0), torch.zeros(0), "weight: expected a dense tensor"),
        (torch.zeros(20, 8), torch.zeros(255), "packed: expected 256, got 255"),
        (torch.zeros(20, 8), torch.zeros(257)[1:], "packed: expected an address that 64 divides"),
    ],
)
def test_the_raw_op_that_packs_checks_its_arguments(weight, packed, match):
    if (reason := kernel_unavailable_reason(torch.float32)) is not None:
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.var_kernels._pack_linear(weight, packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, weight, bias = problem(5, 34, 20, dtype)
    layer = ours(dtype, weight, bias)
    torch.library.opcheck(torch.ops.var_kernels._packed_linear, (x, layer._weight, layer._bias, 20, True))
    torch.library.opcheck(torch.ops.var_kernels._pack_linear, (weight, torch.zeros_like(layer._weight)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: torch.zeros(4, 8).half()}, "x: expected float32 or bfloat16"),
        ({0: torch.zeros(8, 4).t()}, "x: expected a dense tensor"),
        ({0: torch.zeros(4, 2, 4)}, "x: expected a dense tensor"),
        ({0: torch.zeros(4, 0), 1: torch.zeros(0)}, "x: expected columns"),
        ({0: torch.zeros(4, 7).bfloat16(), 1: torch.zeros(224).bfloat16()}, "x: expected an even number"),
        ({1: torch.zeros(255)}, "packed: expected 256, got 255"),
        ({1: torch.zeros(256).bfloat16()}, "packed: expected Float"),
        ({2: torch.zeros(20)}, "bias: expected"),
        ({2: torch.zeros(32).bfloat16()}, "bias: expected"),
        ({3: 0}, "out_features: expected"),
        ({3: 33}, "packed: expected"),
    ],
)  # fmt: skip
def test_the_raw_op_checks_its_arguments(change, match):
    if (reason := kernel_unavailable_reason(torch.float32)) is not None:
        pytest.skip(reason)
    arguments = [torch.zeros(4, 8), torch.zeros(256), torch.zeros(32), 20, False]
    for i, argument in change.items():
        arguments[i] = argument
    with pytest.raises(RuntimeError, match=match):
        torch.ops.var_kernels._packed_linear(*arguments)


def test_a_packed_layer_is_a_snapshot():
    weight, x = randn(20, 10, seed=1), randn(3, 10, seed=2)
    layer = PackedLinear(weight)
    before = layer(x)
    weight.zero_()
    assert layer.backend == "reference" or torch.equal(layer(x), before)


def test_every_dtype_that_is_not_packed():
    for dtype in (torch.float16, torch.float64):
        x, weight = randn(3, 10, seed=2).to(dtype), randn(20, 10, seed=1).to(dtype)
        assert torch.equal(PackedLinear(weight)(x), F.linear(x, weight))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.zeros(4)}, ValueError, "weight: expected 2 dimensions"),
        ({"weight": [[0.0]]}, TypeError, "weight: expected a torch.Tensor, got list"),
        ({"weight": torch.zeros(4, 3).int()}, TypeError, "weight: expected float32, .* got torch.int32"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \(4,\), got \(3,\)"),
        ({"bias": torch.zeros(4).long()}, TypeError, "bias: expected float32"),
        ({"dtype": torch.int8}, TypeError, "dtype: expected float32"),
        ({"backend": "best"}, ValueError, "backend: expected one of auto, cpu"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias: expected device"),
    ],
)
def test_bad_weights(change, error, match):
    with pytest.raises(error, match=match):
        PackedLinear(**{"weight": torch.zeros(4, 3), "bias": torch.zeros(4), **change})


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(2, 4), ValueError, r"x: expected shape \(…, 3\), got \(2, 4\)"),
        (torch.zeros(()), ValueError, r"x: expected shape \(…, 3\), got \(\)"),
        (torch.zeros(2, 3).bfloat16(), TypeError, "x: expected torch.float32 like the layer, got torch.bfloat16"),
        ([0.0, 0.0, 0.0], TypeError, "x: expected a torch.Tensor"),
        (torch.zeros(2, 3, device="meta"), ValueError, "x: expected device cpu"),
        (torch.zeros(2, 3, requires_grad=True), RuntimeError, "no gradient"),
    ],
)
def test_bad_input(x, error, match, make):
    with pytest.raises(error, match=match):
        make(torch.zeros(4, 3))(x)
