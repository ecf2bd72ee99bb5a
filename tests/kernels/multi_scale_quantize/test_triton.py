"""The Triton kernels of multi_scale_quantize and next_scale_input, interpreted and as compiled for sm_80."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from tests.helpers.triton_launches import recorded
from tests.kernels.multi_scale_quantize.contract import (
    SHAPES,
    assert_exact_far_from_the_origin,
    assert_right,
    assert_right_step,
    gradients,
    inputs,
    leaves,
    pairs,
)
from tests.model.golden import Golden
from tools.gpu_emulation.triton import executing, interpret, run_ptx
from var_kernels import multi_scale_quantize, next_scale_input
from var_kernels.testing import poison, randn
from var_kernels.triton import multi_scale_quantize as forward_kernels
from var_kernels.triton import multi_scale_quantize_backward as backward_kernels
from var_kernels.triton import nearest_code as search_kernels
from var_kernels.triton.configs import TABLE, Config, override
from var_kernels.triton.offline import compilations, compile_for
from var_kernels.triton.targets import TARGETS

STEMS = ("nearest_code.", "multi_scale_quantize.", "multi_scale_quantize_backward.")


def tiles(**sizes: int) -> dict[str, Config]:
    """Configurations of all kernels of the quantizer, with those of `sizes` that a kernel has."""
    kernels = [name for name in TABLE if name.startswith(STEMS)]
    return {name: Config({tile: sizes.get(tile, size) for tile, size in TABLE[name][-1].config.tiles.items()})
            for name in kernels}  # fmt: skip


# The interpreter's time depends on the number of programs and operations, not on the size of a tile. Pixels, tokens,
# codes, pooling windows and channels straddle SMALL tiles. With ROOMY ones there are one or two programs per map.
SMALL = tiles(BLOCK_N=16, BLOCK_V=16, BLOCK_C=16, BLOCK_Q=2, BLOCK_S=4, BLOCK_P=16, BLOCK_I=16, BLOCK_O=16, BLOCK_T=16)
ROOMY = tiles(BLOCK_N=64, BLOCK_V=32, BLOCK_C=32, BLOCK_Q=8, BLOCK_S=4, BLOCK_P=64, BLOCK_I=32, BLOCK_O=32, BLOCK_T=64)
TINY = (2, 5, 12, 2, ((1, 1), (2, 3), (5, 4)))  # batch, channels, codes, convolutions, maps


def triton(tensors, shape, **options):
    return multi_scale_quantize(*tensors, shape[-1], **options, backend="triton")


def forward_and_backward(function, tensors, shape, **options):
    with executing(function):
        arguments = leaves(tensors)
        result = triton(arguments, shape, **options)
        return result, gradients(result, arguments)


# ---- numbers ---------------------------------------------------------------------------------------------------------


# These are interpreted with roomy tiles, or compiled with the shipped ones. There are several images and scales, one or
# several convolutions, maps that are not square, maps of the full size or larger before the last one, a single scale,
# pixel or channel, and more channels than a tile has.
CASES = [
    ("narrow", "l2", interpret, ROOMY),
    ("one channel", "cosine", interpret, ROOMY),
    ("one pixel", "cosine", interpret, ROOMY),
    ("one scale", "l2", run_ptx, {}),
    ("full size twice", "cosine", run_ptx, {}),
    ("larger on the way", "l2", run_ptx, {}),
    ("wide", "l2", run_ptx, {}),
    ("two strips", "cosine", run_ptx, {}),
]


@pytest.mark.parametrize("name, metric, function, configs", CASES, ids=[case[0] for case in CASES])
def test_forward_and_backward(name, metric, function, configs):
    shape = SHAPES[name]
    tensors = inputs(shape)
    with override(configs):
        outcome = forward_and_backward(function, tensors, shape, metric=metric)
    assert_right(*outcome, tensors, shape[-1], metric=metric)


def test_small_tiles_and_uneven_slices(monkeypatch):
    # 3 images are in slices of 2, 20 pixels in tiles of 16, and 18 channels in two tiles, and pooled before the search.
    monkeypatch.setattr(backward_kernels, "_SLICES", 2)
    shape = (3, 18, 33, 2, ((1, 2), (5, 4)))
    tensors = inputs(shape)
    with override(SMALL):
        outcome = forward_and_backward(run_ptx, tensors, shape)
    assert_right(*outcome, tensors, shape[-1])


def test_tokens_of_the_official_model():
    golden = Golden("tiny", "triton")
    with executing(interpret), override(ROOMY):
        tokens = golden.vqvae.encode(golden["image"])
    assert torch.equal(tokens, golden["tokens"].long())


@pytest.mark.parametrize("name, configs", [("larger on the way", ROOMY), ("narrow", SMALL), ("one pixel", ROOMY)])
def test_next_scale_input(name, configs):
    shape = SHAPES[name]
    f_hat, _, *phi = inputs(shape)
    for k, (height, width) in enumerate(pairs(shape[-1])):
        tensors = (f_hat, randn(shape[0], height * width, shape[1], seed=20 + k), *phi)
        with executing(interpret), override(configs):
            ours = next_scale_input(*tensors, shape[-1], k, phi_ratio=0.4, backend="triton")
        assert_right_step(ours, tensors, shape[-1], k, phi_ratio=0.4)


# ---- the code that Triton compiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_compiled(dtype):
    tensors = inputs(TINY, dtype=dtype)
    with override(SMALL):
        result, derivatives = forward_and_backward(run_ptx, tensors, TINY)
    assert result.f_hat.dtype == dtype and result.vq_loss.dtype == torch.float32
    assert_right(result, derivatives, tensors, TINY[-1])


def test_compiled_next_scale_input():
    f_hat, _, *phi = inputs(TINY)
    tensors = (f_hat, randn(2, 6, 5, seed=20), *phi)
    with executing(run_ptx), override(SMALL):
        ours = next_scale_input(*tensors, TINY[-1], 1, backend="triton")
    assert_right_step(ours, tensors, TINY[-1], 1)


def vary(batch, patch_nums):
    """The launches of a training step with 32 channels and 4 convolutions, as in VAR."""
    tensors = inputs((batch, 32, 128, 4, patch_nums))

    def step():
        arguments = leaves(tensors)
        gradients(multi_scale_quantize(*arguments, patch_nums, backend="triton"), arguments)
        next_scale_input(arguments[0], torch.zeros(batch, patch_nums[0] ** 2, 32), *arguments[2:], patch_nums, 0,
                         backend="triton")  # fmt: skip

    return recorded(step)


def test_no_recompilation_for_other_schedules_and_batches():
    kernels = [getattr(module, name.rpartition(".")[2])
               for module, stem in zip((search_kernels, forward_kernels, backward_kernels), STEMS, strict=True)
               for name in TABLE if name.startswith(stem)]  # fmt: skip
    counts = []
    for batch, patch_nums in ((2, (1, 2, 5, 8)), (3, (2, 3, 4, 6, 7, 8)), (1, (1, 8))):
        for launch in vary(batch, patch_nums):
            compile_for(launch, TARGETS["sm_80"])
        counts.append([compilations(kernel, TARGETS["sm_80"]) for kernel in kernels])
    assert counts[0] == counts[1] == counts[2] and sum(counts[0]) > 12


def test_compiled_products_are_fp32():
    launches = {launch.name: launch for launch in vary(2, (1, 8))}
    for name in ("multi_scale_quantize.search", "multi_scale_quantize.update", "multi_scale_quantize.add_scale",
                 "multi_scale_quantize_backward.convolve", "multi_scale_quantize_backward.phi_gradients"):  # fmt: skip
        ptx = compile_for(launches[name], TARGETS["sm_80"]).asm["ptx"]
        assert "fma.rn.f32" in ptx and "mma.sync" not in ptx and "tf32" not in ptx, name
        assert "cp.async.cg.shared.global" in ptx, name  # 16 bytes per thread


def test_codes_far_from_the_origin():
    with executing(interpret):
        for configs in (SMALL, ROOMY):  # the first searches rows that are pooled before, the second pools them itself
            with override(configs):
                assert_exact_far_from_the_origin(functools.partial(multi_scale_quantize, backend="triton"))


# ---- the call --------------------------------------------------------------------------------------------------------


def test_launches():
    shape = SHAPES["narrow"]
    names = [launch.name.rpartition(".")[2] for launch in recorded(lambda: triton(inputs(shape), shape))]
    assert names == ["prepare", *["search", "upsample", "update"] * 2, "search", "update"]


def test_non_finite_values():
    shape = SHAPES["narrow"]
    f, codebook, *phi = inputs(shape)
    with override(ROOMY):
        with executing(interpret):
            clean = triton((f, codebook, *phi), shape)
        f[0, 2, 2, 2], f[0, 1, 3, 1] = torch.nan, torch.inf
        result, derivatives = forward_and_backward(interpret, (f, codebook, *phi), shape)
        assert ((result.tokens >= 0) & (result.tokens < codebook.shape[0])).all()
        assert torch.equal(result.f_hat.isnan(), ~f.isfinite())
        assert not result.vq_loss.isfinite()
        assert torch.equal(result.tokens[1:], clean.tokens[1:]) and torch.equal(result.f_hat[1:], clean.f_hat[1:])
        assert torch.equal(derivatives[0].isfinite(), f.isfinite())
        with executing(interpret):
            assert triton((f, codebook * torch.nan, *phi), shape).f_hat.isnan().all()


def test_layouts():
    f, codebook, weight, bias = inputs(TINY)
    height, width = f.shape[-2:]
    roomy = torch.full((2, 9, height + 3, 2 * width), torch.nan)
    window = roomy[:, 1:6, 2 : height + 2, ::2]
    window.copy_(f)
    strided_bias = torch.stack([bias] * 2, 2)[..., 0]
    strided = (window, codebook.T.contiguous().T, torch.stack([weight] * 2, 1)[:, 0], strided_bias)
    codes = randn(2, 6, 5, seed=1)
    with override(SMALL):
        expected = forward_and_backward(run_ptx, (f, codebook, weight, bias), TINY)
        arguments = [tensor.detach().requires_grad_() for tensor in strided]
        with executing(run_ptx):
            result = triton(arguments, TINY)
            derivatives = gradients(result, arguments)
            last = triton([f.contiguous(memory_format=torch.channels_last), codebook, weight, bias], TINY)
            step = next_scale_input(f, codes, weight, bias, TINY[-1], 1, backend="triton")
            columns = codes.mT.contiguous().mT
            strided_step = next_scale_input(window, columns, *strided[2:], TINY[-1], 1, backend="triton")
    pairs_of_parts = zip((*result, *derivatives, *strided_step), (*expected[0], *expected[1], *step), strict=True)
    assert all(torch.equal(part, expected_part) for part, expected_part in pairs_of_parts)
    assert all(torch.equal(part, expected_part) for part, expected_part in zip(last, expected[0], strict=True))


def test_writes_every_element_and_repeats_itself():
    tensors, results = inputs(TINY), []
    for _ in range(2):
        poison()
        with override(SMALL):
            result, derivatives = forward_and_backward(run_ptx, tensors, TINY)
            poison()
            with executing(run_ptx):
                codes = tensors[0].flatten(2).mT
                step = next_scale_input(tensors[0], codes, *tensors[2:], TINY[-1], 2, backend="triton")
        results.append((*result, *derivatives, step[0]))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_more_maps_than_a_grid_has(monkeypatch):
    monkeypatch.setattr(forward_kernels, "_MOST_MAPS", 6)  # two images of three scales
    shape = (5, *TINY[1:])
    tensors = inputs(shape)
    outcome = forward_and_backward(interpret, tensors, shape)
    monkeypatch.setattr(forward_kernels, "_MOST_MAPS", 2)
    again = forward_and_backward(interpret, tensors, shape)
    assert_right(*outcome, tensors, shape[-1])
    assert_right(*again, tensors, shape[-1])


def test_empty_batch():
    f, *others = leaves(inputs(TINY))
    with executing(interpret):
        result = triton((f[:0], *others), TINY)
        assert result.tokens.shape == (0, 27) and result.vq_loss.item() == 0
        out, following = next_scale_input(f[:0], f.new_empty(0, 6, 5), *others[1:], TINY[-1], 1, backend="triton")
        assert out.shape == (0, 5, 5, 4) and following.shape == (0, 20, 5)
        op = torch.ops.var_kernels_triton._multi_scale_quantize_backward
        tokens, derrors = torch.zeros(0, 27, dtype=torch.int64), torch.zeros(0, 3)
        schedule = ([1, 2, 5], [1, 3, 4], [0, 0, 1])
        df, *parameters = op(f[:0].detach(), *(t.detach() for t in others), tokens, derrors, *schedule, 0.5)
        assert df.shape == (0, 5, 5, 4) and not any(gradient.any() for gradient in parameters)


def test_opcheck_and_compile():
    shape = (1, 3, 5, 2, (1, 2))
    tensors, schedule = inputs(shape), ([1, 2], [1, 2], [0, 1])
    ops = torch.ops.var_kernels_triton
    with executing(interpret), override(ROOMY):
        tokens = ops._multi_scale_quantize(*tensors, *schedule, 0.5, False)[0]
        derrors = torch.ones(()).expand(1, 2)
        for op, arguments in (
            (ops._multi_scale_quantize, (*tensors, *schedule, 0.5, False)),
            (ops._multi_scale_quantize_backward, (*tensors, tokens, derrors, *schedule, 0.5)),
            (ops._next_scale_input, (tensors[0], torch.zeros(1, 1, 3), *tensors[2:], 1, 1, 1, 2, 2, 0.5)),
            (ops._next_scale_input, (tensors[0], torch.zeros(1, 4, 3), *tensors[2:], 1, 2, 2, 0, 0, 0.5)),
        ):
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
        arguments = leaves(tensors)
        compiled = torch.compile(lambda *x: triton(x, shape), fullgraph=True, backend="aot_eager")
        for part, expected in zip(
            gradients(compiled(*arguments), arguments), gradients(triton(arguments, shape), arguments), strict=True
        ):
            assert torch.equal(part, expected)
