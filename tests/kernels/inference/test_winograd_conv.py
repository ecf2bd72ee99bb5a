"""PackedConv3x3: accuracy against fp64, borders, layouts, the residual, arguments."""

import functools

import pytest
import torch
import torch.nn.functional as F

from var_kernels import PackedConv3x3
from var_kernels.inference import winograd_conv
from var_kernels.inference.winograd_conv import SCHEMES, prepared_bytes
from var_kernels.native import load
from var_kernels.testing import randn, stated_order

DTYPES = (torch.float32, torch.bfloat16)
# B, C_in, C_out, H, W. Heights and widths are on both sides of a tile; there are one or several blocks, channels with
# every tail, and strips of 80.
SHAPES = [(1, 1, 16, 1, 1), (1, 8, 3, 10, 9), (2, 5, 17, 2, 3), (1, 32, 96, 7, 9), (2, 33, 40, 13, 5),
          (3, 16, 80, 24, 18), (1, 160, 176, 16, 12), (1, 64, 64, 50, 47)]  # fmt: skip
# The error is at most this many times that of a direct convolution. F(4×4) has larger constants, and F(2×2) in bf16
# rounds its factors once more. Over few channels, a direct convolution rounds so little that one more unit of rounding
# is three times as much.
SLACK = {torch.float32: 6.0, torch.bfloat16: 1.6}
needs_kernel = pytest.mark.skipif(not load.native_library().available, reason="no native library")


def problem(batch, channels, out_channels, height, width, dtype=torch.float32, scale=1):
    x = randn(batch, channels, height, width, seed=height, dtype=dtype)
    weight = randn(out_channels, channels, 3, 3, seed=2) / (9 * channels) ** 0.5
    residual = randn(batch, out_channels, scale * height, scale * width, seed=4, dtype=dtype)
    return x, weight, randn(out_channels, seed=3), residual


def plain(x, weight, bias, doubling):
    x = F.interpolate(x, scale_factor=2, mode="nearest") if doubling else x
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=1)


def rms(x):
    return x.double().square().mean().sqrt()


@pytest.fixture(params=[scheme.name for scheme in SCHEMES])
def scheme(request, monkeypatch):
    """Runs the test with each scheme, if the instruction set leaves the choice."""
    monkeypatch.setattr(winograd_conv, "_CACHED_BYTES", {"two": 0, "four": 1 << 40, "doubling": 0}[request.param])
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, scheme):
    doubling = scheme == "doubling"
    x, weight, bias, residual = problem(*shape, dtype, scale=2 if doubling else 1)
    exact = plain(x.double(), weight, bias, doubling)
    with stated_order():
        same = plain(x, weight, bias, doubling)
    conv = PackedConv3x3(weight, bias, dtype=dtype, doubling=doubling)
    for found, expected, direct in (
        (conv(x), exact, same),
        (conv(x, residual), exact + residual, same + residual),
    ):
        assert found.shape == expected.shape and found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        unit = torch.finfo(dtype).eps * rms(expected) / 4
        error, yardstick = found - expected, direct - expected
        assert rms(error) <= SLACK[dtype] * rms(yardstick) + unit
        assert error.abs().max() <= 2 * SLACK[dtype] * yardstick.abs().max() + 8 * unit


@needs_kernel
def test_each_scheme_is_used():
    def name(channels, **options):
        weight = torch.zeros(channels, channels, 3, 3)
        return SCHEMES[PackedConv3x3(weight, torch.zeros(channels), **options).scheme].name

    assert (name(32), name(640), name(32, doubling=True)) == ("four", "two", "doubling")
    pairs = load.native_library().isa in ("avx512_bf16", "amx")
    assert name(32, dtype=torch.bfloat16) == ("two" if pairs else "four")


@needs_kernel
def test_a_named_backend_is_that_backend_or_an_error():
    x, weight, bias, residual = problem(1, 8, 16, 5, 6, torch.float64)
    conv = PackedConv3x3(weight.double(), bias.double())
    assert conv.backend == "reference"
    torch.testing.assert_close(conv(x, residual), plain(x, weight, bias, False) + residual)
    with pytest.raises(ValueError, match="'cpu' cannot serve winograd_conv .* does not take torch.float64"):
        PackedConv3x3(weight.double(), bias.double(), backend="cpu")
    with pytest.raises(ValueError, match="'triton' cannot serve winograd_conv on cpu"):
        PackedConv3x3(weight, bias, backend="triton")
    assert PackedConv3x3(weight, bias).backend == PackedConv3x3(weight, bias, backend="cpu").backend == "cpu"
    x, residual = x.float(), residual.float()
    for doubling in (False, True):
        conv = PackedConv3x3(weight, bias, doubling=doubling, backend="reference")
        assert conv.backend == "reference"
        torch.testing.assert_close(conv(x), plain(x, weight, bias, doubling))
        assert conv(x).is_contiguous(memory_format=torch.channels_last)


def test_layouts_threads_and_runs_agree(scheme, restore_threads):
    doubling = scheme == "doubling"
    x, weight, bias, residual = problem(2, 40, 100, 12, 20, scale=2 if doubling else 1)
    conv = PackedConv3x3(weight, bias, doubling=doubling)
    want = conv(x, residual)
    wide = torch.full((2, 41, 12, 25), torch.nan)
    wide[:, :40, :, :20] = x
    # PyTorch chooses its kernels by the layout, so that its results may differ.
    agree = torch.equal if conv.backend == "cpu" else functools.partial(torch.allclose, atol=1e-5)
    for same in (x.contiguous(memory_format=torch.channels_last), wide[:, :40, :, :20]):
        assert agree(conv(same, residual), want)
    assert agree(conv(x, residual.contiguous(memory_format=torch.channels_last)), want)
    assert agree(conv(x[1:], residual[1:]), want[1:])
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        assert agree(conv(x, residual), want)


def test_out_may_be_the_residual(scheme):
    doubling = scheme == "doubling"
    x, weight, bias, residual = problem(2, 40, 100, 12, 20, scale=2 if doubling else 1)
    conv = PackedConv3x3(weight, bias, doubling=doubling)
    residual = residual.contiguous(memory_format=torch.channels_last)
    assert conv.shape_of(x) == residual.shape
    for added in (None, residual):
        want = conv(x, added)
        for out in (torch.full_like(residual, torch.nan), residual if added is residual else torch.ones_like(residual)):
            assert conv(x, added, out=out) is out
            assert torch.equal(out, want)


@needs_kernel
def test_large_outputs_stored_past_the_caches_are_the_same():
    x, weight, bias, residual = problem(1, 16, 64, 330, 330)  # 28 MB of outputs
    conv = PackedConv3x3(weight, bias)
    part = conv(x[..., :40, :], residual[..., :40, :])  # 3 MB
    y = conv(x, residual)
    assert torch.equal(y[..., :36, :], part[..., :36, :])
    residual = residual.contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv(x, residual, out=residual), y)


def test_nan_stays_near_its_pixel_and_in_its_image(scheme):
    doubling = scheme == "doubling"
    x, weight, bias, _ = problem(2, 8, 16, 20, 20)
    x[1, 3, 10, 10] = torch.nan
    y = PackedConv3x3(weight, bias, doubling=doubling)(x)
    scale = 2 if doubling else 1
    assert not y[0].isnan().any()
    assert y[1, :, 9 * scale + scale - 1 : 11 * scale + 1, 9 * scale + scale - 1 : 11 * scale + 1].isnan().all()
    # All of a tile that reads the pixel is NaN, which is at most 5 rows and columns away.
    near = slice(scale * 5, scale * 16)
    y[1, :, near, near] = 0
    assert not y.isnan().any()


@needs_kernel
def test_nothing_to_do():
    _, weight, bias, _ = problem(1, 8, 16, 1, 1)
    for shape, doubled in (((0, 8, 3, 3), (0, 16, 6, 6)), ((2, 8, 0, 3), (2, 16, 0, 6))):
        assert PackedConv3x3(weight, bias, doubling=True)(torch.zeros(shape)).shape == doubled


@pytest.mark.parametrize("doubling", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(16, 32), (33, 70), (3, 16), (640, 640)])
def test_bytes(channels, dtype, doubling):
    conv = PackedConv3x3(torch.zeros(*channels, 3, 3), torch.zeros(channels[0]), dtype=dtype, doubling=doubling)
    assert conv.nbytes == prepared_bytes(*channels, dtype, doubling) == conv._weight.untyped_storage().nbytes()
    plain = PackedConv3x3(
        torch.zeros(*channels, 3, 3), torch.zeros(channels[0]), dtype=dtype, doubling=doubling, backend="reference"
    )
    assert plain.nbytes == prepared_bytes(*channels, dtype, doubling, backend="reference")


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, scheme):
    x, weight, bias, residual = problem(1, 8, 24, 5, 6, dtype, scale=2 if scheme == "doubling" else 1)
    conv = PackedConv3x3(weight, bias, dtype=dtype, doubling=scheme == "doubling")
    x, residual = (tensor.permute(0, 2, 3, 1).contiguous() for tensor in (x, residual))
    arguments = (x, conv._weight, conv._bias, residual, conv.scheme, torch.zeros_like(residual))
    torch.library.opcheck(torch.ops.var_kernels._winograd_conv, arguments)
    transform = torch.tensor(SCHEMES[conv.scheme].filters, dtype=torch.float64)
    packing = (weight.float(), transform, torch.zeros_like(conv._weight))
    torch.library.opcheck(torch.ops.var_kernels._pack_winograd, packing)


@needs_kernel
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [(1, 1), (16, 32), (80, 33), (81, 64), (170, 95)], ids=str)
def test_the_order_of_packed_filters(channels, dtype, source, scheme):
    weight = randn(*channels, 3, 3, seed=1).to(source)
    conv = PackedConv3x3(weight, torch.zeros(channels[0]), dtype=dtype, doubling=scheme == "doubling")
    taps = torch.tensor(SCHEMES[conv.scheme].filters, dtype=torch.float64)
    points = torch.einsum("pi,qj,ocij->pqco", taps, taps, weight.float().double()).flatten(0, 1)
    points = torch.nn.functional.pad(points, (0, -channels[0] % 16, 0, -channels[1] % 32))
    together = 2 if conv._weight.dtype == torch.bfloat16 else 1
    points = points.unflatten(1, (-1, together)).transpose(2, 3)
    expected = torch.cat([strip.flatten() for strip in points.split(80, dim=2)])
    # The transform is rounded once, from float64: two orders of summation in float64 give neighbours at most.
    torch.testing.assert_close(
        conv._weight.double(), expected, rtol=2**-8 if together == 2 else 2**-23, atol=1e-12
    )
    assert (conv._weight == expected.to(conv._weight.dtype)).double().mean() > 0.999


@needs_kernel
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: torch.zeros(16, 8, 3, 3).double()}, "weight: expected a dense float32 tensor"),
        ({0: torch.zeros(16, 8, 3)}, "weight: expected a dense float32 tensor"),
        ({0: torch.zeros(16, 8, 5, 5)}, "weight: expected a dense float32 tensor"),
        ({0: torch.zeros(8, 16, 3, 3).transpose(0, 1)}, "weight: expected a dense float32 tensor"),
        ({1: torch.zeros(4, 3)}, "transform: expected a dense float64 tensor"),
        ({1: torch.zeros(7, 3).double()}, "transform: expected a dense float64 tensor"),
        ({1: torch.zeros(4, 4).double()}, "transform: expected a dense float64 tensor"),
        ({2: torch.zeros(16 * 32 * 16).half()}, "packed: expected float32 or bfloat16"),
        ({2: torch.zeros(16 * 32 * 16 - 1)}, "packed: expected 8192, got 8191"),
        ({2: torch.zeros(16 * 32 * 16 + 1)[1:]}, "packed: expected an address that 64 divides"),
    ],
)
def test_the_raw_op_that_packs_checks_its_arguments(change, match):
    arguments = [torch.zeros(16, 8, 3, 3), torch.zeros(4, 3).double(), torch.zeros(16 * 32 * 16)]
    for i, argument in change.items():
        arguments[i] = argument
    with pytest.raises(RuntimeError, match=match):
        torch.ops.var_kernels._pack_winograd(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"weight": torch.zeros(16, 8, 3)}, ValueError, "weight: expected 4 dimensions"),
        ({"weight": torch.zeros(16, 8, 5, 5)}, ValueError, r"weight: expected shape \(O, C, 3, 3\)"),
        ({"bias": torch.zeros(15)}, ValueError, r"bias: expected shape \(16,\), got \(15,\)"),
        ({"x": torch.zeros(8, 4, 4)}, ValueError, "x: expected 4 dimensions"),
        ({"x": torch.zeros(2, 7, 4, 4)}, ValueError, "x: expected shape"),
        ({"x": torch.zeros(2, 8, 4, 4).half()}, TypeError, "x: expected torch.float32, got torch.float16"),
        ({"x": torch.zeros(2, 8, 4, 4, requires_grad=True)}, RuntimeError, "no gradient"),
        ({"residual": torch.zeros(2, 16, 4, 5)}, ValueError, "residual: expected shape"),
        ({"residual": torch.zeros(2, 16, 4, 4).half()}, TypeError, "residual: expected torch.float32"),
        ({"out": torch.zeros(2, 16, 4, 4)}, ValueError, "out: expected a dense tensor with its channels last"),
        ({"out": torch.zeros(2, 16, 4, 5)}, ValueError, r"out: expected shape \(2, 16, 4, 4\)"),
        ({"out": torch.zeros(2, 16, 4, 4).half()}, TypeError, "out: expected torch.float32"),
        ({"out": torch.zeros(2, 16, 4, 4).to(memory_format=torch.channels_last).requires_grad_()}, RuntimeError,
         "no gradient"),
        ({"out": "x"}, ValueError, "out: expected memory of its own, got that of x"),
    ],
)  # fmt: skip
def test_bad_input(change, error, match):
    arguments = {
        "weight": torch.zeros(16, 8, 3, 3), "bias": torch.zeros(16), "x": torch.zeros(2, 8, 4, 4), "residual": None,
        "out": None, **change,
    }  # fmt: skip
    if isinstance(arguments["out"], str):
        arguments["weight"] = torch.zeros(16, 16, 3, 3)
        arguments["x"] = arguments["out"] = torch.zeros(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(error, match=match):
        conv = PackedConv3x3(arguments["weight"], arguments["bias"])
        conv(arguments["x"], arguments["residual"], out=arguments["out"])


@needs_kernel
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({0: torch.zeros(1, 4, 4, 8).half()}, "x: expected float32 or bfloat16"),
        ({0: torch.zeros(1, 8, 4, 4).permute(0, 2, 3, 1)}, "x: expected a dense tensor"),
        ({0: torch.zeros(1, 4, 4, 0), 1: torch.zeros(0)}, "x: expected at least one channel"),
        ({1: torch.zeros(5)}, "packed: expected"),
        ({1: torch.zeros(36 * 32 * 16).bfloat16()}, "packed: expected float32"),
        ({2: torch.zeros(15)}, "bias: expected"),
        ({3: torch.zeros(1, 4, 4, 8)}, "residual: expected"),
        ({4: 3}, "scheme: expected 0, 1 or 2, got 3"),
        ({5: torch.zeros(1, 4, 4, 32)}, "packed: expected"),
        ({5: torch.zeros(1, 4, 4, 0)}, "y: expected"),
        ({5: torch.zeros(1, 4, 5, 16)}, "y: expected"),
        ({5: torch.zeros(1, 4, 4, 16).bfloat16()}, "y: expected"),
        ({5: torch.zeros(1, 4, 16, 4).transpose(2, 3)}, "y: expected"),
    ],
)  # fmt: skip
def test_the_raw_op_checks_its_arguments(change, match):
    arguments = [torch.zeros(1, 4, 4, 8), torch.zeros(36 * 32 * 16), torch.zeros(16), None, 1, torch.zeros(1, 4, 4, 16)]
    for i, argument in change.items():
        arguments[i] = argument
    with pytest.raises(RuntimeError, match=match):
        torch.ops.var_kernels._winograd_conv(*arguments)
