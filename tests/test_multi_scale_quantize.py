"""multi_scale_quantize and next_scale_input: tokens, values and gradients against an independent composition."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F

from var_kernels import multi_scale_quantize, next_scale_input
from var_kernels.backends import unavailable_reason
from var_kernels.multi_scale_quantize import phi_index
from var_kernels.testing import assert_accurate, isa_levels, poison, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("f", "codebook", "phi_weight", "phi_bias")

# (batch, channels, codes, convolutions, maps). Channels straddle the vectors of every ISA level (4, 8, 16) and the
# column strips of the matrix product (16, 32, 64); heights straddle the bands of four rows, widths the register tile of
# six pixels; batches straddle the slots of eight images of the backward; maps are square and not, taller than wide,
# as large as the full map in the middle of the schedule, larger than it along one axis, and a single one. Several
# images where maps are small: the codes of scale 0 are constant over an image, and so is their rounding error, which
# makes the sums over the pixels of few images a matter of luck.
SHAPES = {
    "VAR": (2, 32, 120, 4, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)),
    "narrow": (3, 3, 17, 1, (1, 2, 4)),
    "one vector": (4, 8, 65, 4, (1, 3, 5)),
    "just over a vector": (3, 17, 33, 2, (2, 5, 7)),
    "just under": (5, 15, 60, 3, (1, 5, 11)),
    "two strips": (1, 65, 40, 4, (1, 2, 3, 7)),
    "one code": (2, 5, 1, 4, (1, 3)),
    "one channel": (2, 1, 9, 4, (1, 2, 3)),
    "one scale": (3, 9, 30, 4, (6,)),
    "one pixel": (3, 6, 30, 1, (1,)),
    "wide": (4, 12, 50, 6, ((1, 1), (1, 3), (2, 5), (3, 4), (4, 11), (4, 13))),
    "tall": (3, 12, 50, 5, ((1, 1), (3, 1), (8, 2), (13, 3))),
    "full size twice": (4, 7, 50, 3, ((5, 6), (2, 2), (5, 6))),
    "larger on the way": (1, 7, 50, 3, ((2, 2), (9, 4), (3, 11), (5, 6))),
    "nine images": (9, 8, 40, 4, (1, 2, 3, 5)),
    "seventeen images": (17, 4, 20, 2, (1, 2, 3)),
}
SMALL = SHAPES["just over a vector"]


@pytest.fixture
def cpu():
    """Skips where the native library is not available."""
    reason = unavailable_reason("cpu", "cpu", "multi_scale_quantize")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    if request.param == "cpu":
        request.getfixturevalue("cpu")
    return request.param


def pairs(patch_nums) -> list[tuple[int, int]]:
    return [(size, size) if isinstance(size, int) else size for size in patch_nums]


def inputs(shape, *, seed: int = 1, dtype=torch.float32) -> list[torch.Tensor]:
    """f, codebook, phi_weight, phi_bias; a weak mean in each, so that no part can be ignored."""
    batch, channels, codes, convolutions, patch_nums = shape
    height, width = pairs(patch_nums)[-1]
    return [
        randn(batch, channels, height, width, seed=seed, dtype=dtype),
        (randn(codes, channels, seed=seed + 1, dtype=torch.float64, std=0.6) + 0.05).to(dtype),
        randn(convolutions, channels, channels, 3, 3, seed=seed + 2, dtype=dtype, std=(9 * channels) ** -0.5),
        (randn(convolutions, channels, seed=seed + 3, dtype=torch.float64, std=0.1) + 0.05).to(dtype),
    ]


def composition(f, codebook, weight, bias, patch_nums, *, ratio=0.5, metric="l2", beta=0.25):
    """Algorithm 1 written out once more: tokens, f_hat, loss, and the smallest relative gap of the best two codes."""
    sizes = pairs(patch_nums)
    full, n = sizes[-1], weight.shape[0]
    ticks = numpy.linspace(1 / 3 / n, 1 - 1 / 3 / n, n) if n == 4 else numpy.linspace(1 / 2 / n, 1 - 1 / 2 / n, n)
    f_hat, loss, tokens, gap = torch.zeros_like(f), 0, [], numpy.inf
    for k, size in enumerate(sizes):
        z = F.adaptive_avg_pool2d((f - f_hat).detach(), size).movedim(1, -1)
        if metric == "l2":
            distance = (z.unsqueeze(-2) - codebook.detach()).square().sum(-1)
        else:
            distance = 1 - F.cosine_similarity(z.unsqueeze(-2), codebook.detach(), dim=-1, eps=1e-300)
        if codebook.shape[0] > 1:
            best, second = distance.topk(2, largest=False).values.unbind(-1)
            gap = min(gap, ((second - best) / second).min().item())
        ids = distance.argmin(-1)
        u = F.embedding(ids, codebook).movedim(-1, 1)
        if size != full:
            u = F.interpolate(u, size=full, mode="bicubic")
        i = int(numpy.argmin(numpy.abs(ticks - (k / (len(sizes) - 1) if len(sizes) > 1 else 0))))
        f_hat = f_hat + (1 - ratio) * u + ratio * F.conv2d(u, weight[i], bias[i], padding=1)
        loss = loss + beta * (f_hat.detach() - f).square().mean() + (f_hat - f.detach()).square().mean()
        tokens.append(ids.flatten(1))
    return torch.cat(tokens, dim=1), f_hat, loss / len(sizes), gap


def gradients(result, tensors, seed=9) -> list[torch.Tensor]:
    """Of a weighted sum of f_hat and the loss: both parts matter in the gradient of f."""
    weights = randn(*result.f_hat.shape, seed=seed, dtype=torch.float64, std=1e-3).to(result.f_hat.dtype)
    return torch.autograd.grad((result.f_hat * weights).sum().to(result.vq_loss.dtype) + 3 * result.vq_loss, tensors)


def leaves(tensors, dtype=None) -> list[torch.Tensor]:
    return [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]


# ---- the specification -----------------------------------------------------------------------------------------------


def test_phi_index_is_that_of_numpy():
    for n in range(1, 14):
        ticks = numpy.linspace(1 / 3 / n, 1 - 1 / 3 / n, n) if n == 4 else numpy.linspace(1 / 2 / n, 1 - 1 / 2 / n, n)
        for scales in range(2, 15):
            for k in range(scales):
                assert phi_index(k, scales, n) == numpy.argmin(numpy.abs(ticks - k / (scales - 1))), (k, scales, n)
        assert phi_index(0, 1, n) == 0
    # The released models: scales 2 and 7 lie halfway between two ticks, where rounding decides.
    assert [phi_index(k, 10, 4) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("metric", ("l2", "cosine"))
@pytest.mark.parametrize("name", SHAPES)
def test_reference_is_the_composition(name, metric):
    shape = SHAPES[name]
    tensors = leaves(inputs(shape), torch.float64)
    options = {"metric": metric, "beta": 0.4}
    ratio = 0.3 if metric == "l2" else 0.5
    tokens, f_hat, loss, gap = composition(*tensors, shape[-1], ratio=ratio, **options)
    ours = multi_scale_quantize(*tensors, shape[-1], phi_ratio=ratio, **options, backend="reference")
    assert gap > 1e-9, "a near-tie: choose another seed"
    assert torch.equal(ours.tokens, tokens)
    torch.testing.assert_close(ours.f_hat, f_hat)
    torch.testing.assert_close(ours.vq_loss, loss)
    for ours_part, part in zip(
        torch.autograd.grad(ours.vq_loss, tensors), torch.autograd.grad(loss, tensors), strict=True
    ):
        torch.testing.assert_close(ours_part, part)


def test_gradcheck_of_the_codebook_part():
    # beta 0: the loss is then a function of codebook and phi alone whose derivative is the one that autograd gives.
    f, *parameters = leaves(inputs((2, 3, 7, 3, (1, 2, (3, 2), (3, 4)))), torch.float64)
    patch_nums = (1, 2, (3, 2), (3, 4))

    def loss(*parameters):
        return multi_scale_quantize(f.detach(), *parameters, patch_nums, beta=0, backend="reference").vq_loss

    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True)


@pytest.mark.parametrize("name", ("VAR", "wide", "larger on the way", "full size twice", "one pixel"))
def test_sampling_steps_rebuild_f_hat(backend, name):
    shape = SHAPES[name]
    f, codebook, *phi = inputs(shape)
    sizes = pairs(shape[-1])
    tokens, f_hat, _ = multi_scale_quantize(f, codebook, *phi, shape[-1], backend=backend)
    running, start = torch.zeros_like(f), 0
    for k, (height, width) in enumerate(sizes):
        before = running.clone()
        codes = codebook[tokens[:, start : start + height * width]]
        start += height * width
        previous = running
        running, following = next_scale_input(running, codes, *phi, shape[-1], k, backend=backend)
        assert torch.equal(previous, before), "f_hat was modified"
        if k + 1 == len(sizes):
            assert following is None
        else:
            pooled = F.interpolate(running, size=sizes[k + 1], mode="area").flatten(2).transpose(1, 2)
            torch.testing.assert_close(following, pooled)
    torch.testing.assert_close(running, f_hat)


# ---- the cpu backend -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ("l2", "cosine"))
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(cpu, name, metric):
    shape = SHAPES[name]
    tensors = inputs(shape)
    results = {}
    for key, backend, dtype in (("cpu", "cpu", None), ("plain", "reference", None), ("exact", None, torch.float64)):
        arguments = leaves(tensors, dtype)
        result = multi_scale_quantize(*arguments, shape[-1], metric=metric, backend=backend or "reference")
        results[key] = (result, gradients(result, arguments))
    ours, plain, exact = (results[key][0] for key in ("cpu", "plain", "exact"))
    gap = composition(*(tensor.double() for tensor in tensors), shape[-1], metric=metric)[-1]
    assert gap > 1e-5, "a near-tie that float32 may not resolve: choose another seed"
    assert torch.equal(ours.tokens, exact.tokens) and torch.equal(plain.tokens, exact.tokens)
    assert_accurate(ours.f_hat, plain.f_hat, exact.f_hat, name="f_hat")
    assert_accurate(ours.vq_loss, plain.vq_loss, exact.vq_loss, name="vq_loss")
    for argument, *parts in zip(NAMES, *(results[key][1] for key in ("cpu", "plain", "exact")), strict=True):
        assert_accurate(*parts, name=f"gradient of {argument}")


@pytest.mark.parametrize("name", SHAPES)
def test_next_scale_input(cpu, name):
    shape = SHAPES[name]
    f_hat, _, *phi = inputs(shape)
    for k, (height, width) in enumerate(pairs(shape[-1])):
        tensors = (f_hat, randn(shape[0], height * width, shape[1], seed=20 + k), *phi)
        ours = next_scale_input(*tensors, shape[-1], k, phi_ratio=0.4, backend="cpu")
        plain = next_scale_input(*tensors, shape[-1], k, phi_ratio=0.4, backend="reference")
        exact = next_scale_input(*(tensor.double() for tensor in tensors), shape[-1], k, phi_ratio=0.4)
        for part, *values in zip(("f_hat", "next map"), ours, plain, exact, strict=True):
            if values[0] is not None:
                assert_accurate(*values, name=f"{part} after scale {k}")


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_inputs_are_computed_in_float32(backend, dtype):
    tensors = inputs(SMALL, dtype=dtype)
    wide = [tensor.float() for tensor in tensors]
    ours = multi_scale_quantize(*tensors, SMALL[-1], backend=backend)
    expected = multi_scale_quantize(*wide, SMALL[-1], backend=backend)
    assert torch.equal(ours.tokens, expected.tokens) and torch.equal(ours.vq_loss, expected.vq_loss)
    assert torch.equal(ours.f_hat, expected.f_hat.to(dtype)) and ours.vq_loss.dtype == torch.float32
    codes = tensors[1][ours.tokens[:, :4]]
    step = next_scale_input(tensors[0], codes, *tensors[2:], SMALL[-1], 0, backend=backend)
    wide_step = next_scale_input(wide[0], codes.float(), *wide[2:], SMALL[-1], 0, backend=backend)
    for part, wide_part in zip(step, wide_step, strict=True):
        assert torch.equal(part, wide_part.to(dtype))
    arguments = leaves(tensors)
    for gradient, argument in zip(
        gradients(multi_scale_quantize(*arguments, SMALL[-1], backend=backend), arguments), arguments, strict=True
    ):
        assert gradient.dtype == dtype and gradient.shape == argument.shape and gradient.abs().max() > 0


def test_straight_through(backend):
    arguments = leaves(inputs(SMALL))
    f_hat = multi_scale_quantize(*arguments, SMALL[-1], backend=backend).f_hat
    upstream = randn(*f_hat.shape, seed=5)
    df, *others = torch.autograd.grad(f_hat, arguments, upstream, allow_unused=True)
    assert torch.equal(df, upstream)
    assert all(gradient is None or not gradient.any() for gradient in others)


def test_some_arguments_without_gradient(backend):
    tensors = inputs(SMALL)
    expected = gradients(multi_scale_quantize(*(arguments := leaves(tensors)), SMALL[-1], backend=backend), arguments)
    for i in range(4):
        some = [tensor.clone().requires_grad_(j == i) for j, tensor in enumerate(tensors)]
        result = multi_scale_quantize(*some, SMALL[-1], backend=backend)
        assert not result.tokens.requires_grad
        assert torch.equal(gradients(result, [some[i]])[0], expected[i])


def test_next_scale_input_carries_no_gradient(backend):
    f, codebook, *phi = leaves(inputs(SMALL))
    out, following = next_scale_input(f, codebook[:12].reshape(3, 4, -1), *phi, SMALL[-1], 0, backend=backend)
    assert not out.requires_grad and not following.requires_grad


def test_ties_go_to_the_lowest_index(cpu):
    f, codebook, *phi = inputs(SMALL)
    twice = torch.cat([codebook, codebook, codebook.flip(0)])
    for metric in ("l2", "cosine"):
        expected = multi_scale_quantize(f, codebook, *phi, SMALL[-1], metric=metric, backend="cpu")
        result = multi_scale_quantize(f, twice, *phi, SMALL[-1], metric=metric, backend="cpu")
        assert torch.equal(result.tokens, expected.tokens) and torch.equal(result.f_hat, expected.f_hat)


def test_non_finite_values(backend):
    f, codebook, *phi = inputs(SMALL)
    clean = multi_scale_quantize(f, codebook, *phi, SMALL[-1], backend=backend)
    f[0, 3, 2, 2], f[0, 5, 4, 1] = torch.nan, torch.inf
    arguments = leaves([f, codebook, *phi])
    result = multi_scale_quantize(*arguments, SMALL[-1], backend=backend)
    assert ((result.tokens >= 0) & (result.tokens < codebook.shape[0])).all()
    assert torch.equal(result.f_hat.isnan(), ~f.isfinite())
    assert not result.vq_loss.isfinite()
    assert torch.equal(result.tokens[1], clean.tokens[1]) and torch.equal(result.f_hat[1], clean.f_hat[1])
    df = gradients(result, arguments)[0]
    assert not df[0, 3, 2, 2].isfinite() and not df[0, 5, 4, 1].isfinite()
    for name, broken in (("codebook", codebook), ("phi", phi[0])):
        saved = broken.clone()
        broken.fill_(torch.nan)
        result = multi_scale_quantize(inputs(SMALL)[0], codebook, *phi, SMALL[-1], backend=backend)
        assert result.f_hat.isnan().all(), name
        broken.copy_(saved)


def test_layouts(backend):
    tensors = inputs(SMALL)
    expected = multi_scale_quantize(*(arguments := leaves(tensors)), SMALL[-1], backend=backend)
    expected_gradients = gradients(expected, arguments)
    f, codebook, weight, bias = tensors
    height, width = f.shape[-2:]
    roomy = torch.full((f.shape[0], 20, height + 3, 2 * width), torch.nan)
    roomy[:, 1:18, 2 : height + 2, ::2] = f
    layouts = {
        "channels last": (f.contiguous(memory_format=torch.channels_last), codebook, weight, bias),
        "window": (roomy[:, 1:18, 2 : height + 2, ::2], codebook, weight, bias),
        "transposed": (f.mT.contiguous().mT, codebook.T.contiguous().T, weight.transpose(1, 2).contiguous(), bias),
        "strided phi": (f, torch.stack([codebook, codebook])[1], torch.stack([weight] * 2, 1)[:, 0], bias),
    }
    layouts["transposed"] = (*layouts["transposed"][:2], layouts["transposed"][2].transpose(1, 2), bias)
    for name, layout in layouts.items():
        arguments = [tensor.detach().requires_grad_() for tensor in layout]
        result = multi_scale_quantize(*arguments, SMALL[-1], backend=backend)
        assert torch.equal(result.tokens, expected.tokens), name
        torch.testing.assert_close(result.f_hat, expected.f_hat)
        for part, expected_part in zip(gradients(result, arguments), expected_gradients, strict=True):
            torch.testing.assert_close(part, expected_part)
    codes = codebook[expected.tokens[:, :4]]
    step = next_scale_input(f, codes, weight, bias, SMALL[-1], 0, backend=backend)
    strided = next_scale_input(
        roomy[:, 1:18, 2 : height + 2, ::2], codes.mT.contiguous().mT, weight, bias, SMALL[-1], 0, backend=backend
    )
    for part, expected_part in zip(strided, step, strict=True):
        torch.testing.assert_close(part, expected_part)


def test_expanded_batch(backend):
    f, *others = inputs(SMALL)
    single = multi_scale_quantize(f[:1], *others, SMALL[-1], backend=backend)
    result = multi_scale_quantize(f[:1].expand(3, -1, -1, -1), *others, SMALL[-1], backend=backend)
    assert all(torch.equal(tokens, single.tokens[0]) for tokens in result.tokens)
    torch.testing.assert_close(result.f_hat, single.f_hat.expand(3, -1, -1, -1))


def test_empty_batch(backend):
    f, *others = leaves(inputs(SMALL))
    result = multi_scale_quantize(f[:0], *others, SMALL[-1], backend=backend)
    assert result.tokens.shape == (0, 78) and result.tokens.dtype == torch.int64
    assert result.f_hat.shape == (0, 17, 7, 7) and result.vq_loss.item() == 0
    assert not torch.autograd.grad(result.vq_loss, others[0])[0].any()
    out, following = next_scale_input(f[:0], f.new_empty(0, 25, 17), *others[1:], SMALL[-1], 1, backend=backend)
    assert out.shape == (0, 17, 7, 7) and following.shape == (0, 49, 17)


def test_autocast(backend):
    tensors = inputs(SMALL)
    half = tensors[0].bfloat16()
    expected = multi_scale_quantize(half.float(), *tensors[1:], SMALL[-1], backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = multi_scale_quantize(half, *tensors[1:], SMALL[-1], backend=backend)
        codes = tensors[1][result.tokens[:, :4]]
        step = next_scale_input(half, codes, *tensors[2:], SMALL[-1], 0, backend=backend)
    assert torch.equal(result.tokens, expected.tokens) and torch.equal(result.f_hat, expected.f_hat)
    expected_step = next_scale_input(half.float(), codes, *tensors[2:], SMALL[-1], 0, backend=backend)
    assert all(torch.equal(part, expected) for part, expected in zip(step, expected_step, strict=True))


def test_writes_every_element(cpu):
    tensors = inputs(SHAPES["just under"])
    results = []
    for _ in range(2):
        poison()
        arguments = leaves(tensors)
        result = multi_scale_quantize(*arguments, SHAPES["just under"][-1], backend="cpu")
        poison()
        results.append((*result, *gradients(result, arguments)))
        poison()
        codes = tensors[1][result.tokens[:, 1:26]]
        results[-1] += next_scale_input(tensors[0], codes, *tensors[2:], SHAPES["just under"][-1], 1, backend="cpu")
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_equal_for_any_number_of_threads(cpu):
    # Large enough for the parallel rounds: phi is 19 images · 81 pixels · 9 · 48² multiply-adds. 19 images are several
    # groups, the last one not full.
    shape = (19, 40, 200, 4, (1, 2, 4, 9))
    tensors, threads, results = inputs(shape), torch.get_num_threads(), []
    codes = randn(19, 16, 40, seed=7)
    try:
        for count in (1, 2, 3, 4, 1):
            torch.set_num_threads(count)
            arguments = leaves(tensors)
            result = multi_scale_quantize(*arguments, shape[-1], backend="cpu")
            step = next_scale_input(tensors[0], codes, *tensors[2:], shape[-1], 2, backend="cpu")
            results.append((*result, *gradients(result, arguments), *step))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(part, first) for part, first in zip(result, results[0], strict=True))


def test_an_image_does_not_depend_on_its_batch(cpu):
    f, *others = inputs(SHAPES["nine images"])
    whole = multi_scale_quantize(f, *others, SHAPES["nine images"][-1], backend="cpu")
    for i in range(9):
        alone = multi_scale_quantize(f[i : i + 1], *others, SHAPES["nine images"][-1], backend="cpu")
        assert torch.equal(alone.tokens[0], whole.tokens[i]) and torch.equal(alone.f_hat[0], whole.f_hat[i])


# ---- bad input -------------------------------------------------------------------------------------------------------

QUANTIZE = dict(zip((*NAMES, "patch_nums"), (*inputs((2, 3, 5, 4, (1, 2, 4))), (1, 2, 4)), strict=True))
STEP = {
    "f_hat": QUANTIZE["f"],
    "codes": torch.zeros(2, 4, 3),
    "phi_weight": QUANTIZE["phi_weight"],
    "phi_bias": QUANTIZE["phi_bias"],
    "patch_nums": (1, 2, 4),
    "k": 1,
}
BAD = [
    (multi_scale_quantize, {"f": None}, TypeError, "f: expected a torch.Tensor, got NoneType"),
    (multi_scale_quantize, {"f": torch.zeros(3, 4, 4)}, ValueError, r"f: expected 4 dimensions, got shape \(3, 4, 4\)"),
    (multi_scale_quantize, {"f": torch.zeros(2, 3, 4, 4).long()}, TypeError, "f: expected float32.*got torch.int64"),
    (multi_scale_quantize, {"f": torch.zeros(2, 3, 0, 4)}, ValueError, "f: expected non-empty channels, height"),
    (multi_scale_quantize, {"codebook": torch.zeros(5, 4)}, ValueError, r"codebook: expected shape \(V, 3\).*\(5, 4\)"),
    (multi_scale_quantize, {"codebook": torch.zeros(0, 3)}, ValueError, "codebook: expected shape .* with V >= 1"),
    (multi_scale_quantize, {"codebook": torch.zeros(5, 3).double()}, TypeError, "codebook: expected torch.float32 lik"),
    (multi_scale_quantize, {"codebook": torch.zeros(5, 3, device="meta")}, ValueError, "codebook: expected device cpu"),
    (multi_scale_quantize, {"phi_weight": torch.zeros(3, 3, 3, 3)}, ValueError, "phi_weight: expected 5 dimensions"),
    (multi_scale_quantize, {"phi_weight": torch.zeros(0, 3, 3, 3, 3)}, ValueError, "phi_weight: expected .* n >= 1"),
    (multi_scale_quantize, {"phi_weight": torch.zeros(4, 3, 3, 5, 5)}, ValueError, r"phi_weight: expected .*\(n, 3, 3"),
    (multi_scale_quantize, {"phi_bias": torch.zeros(3, 3)}, ValueError, r"phi_bias: expected shape \(4, 3\), got \(3"),
    (multi_scale_quantize, {"patch_nums": (1, 2, 3)}, ValueError, r"patch_nums: expected the last map to be \(4, 4\)"),
    (multi_scale_quantize, {"patch_nums": (0, 4)}, ValueError, "patch_nums: expected sides of at least 1, got 0"),
    (multi_scale_quantize, {"patch_nums": (1, (2, -1), 4)}, ValueError, "patch_nums: expected sides of at least 1"),
    (multi_scale_quantize, {"patch_nums": (1, 2.0, 4)}, ValueError, "patch_nums: expected integers or .* got 2.0"),
    (multi_scale_quantize, {"patch_nums": (1, (1, 2, 3), 4)}, ValueError, "patch_nums: expected integers or"),
    (multi_scale_quantize, {"patch_nums": ()}, ValueError, "patch_nums: expected at least one scale"),
    (multi_scale_quantize, {"patch_nums": 4}, TypeError, "patch_nums: expected a sequence of map sizes, got int"),
    (multi_scale_quantize, {"metric": "dot"}, ValueError, "metric: expected 'l2' or 'cosine', got 'dot'"),
    (multi_scale_quantize, {"backend": "gpu"}, ValueError, "backend: expected one of auto, .*got 'gpu'"),
    (next_scale_input, {"f_hat": torch.zeros(3, 4, 4)}, ValueError, "f_hat: expected 4 dimensions"),
    (next_scale_input, {"f_hat": torch.zeros(2, 0, 4, 4)}, ValueError, "f_hat: expected non-empty channels"),
    (next_scale_input, {"codes": torch.zeros(2, 5, 3)}, ValueError, r"codes: expected shape \(2, 4, 3\), got \(2, 5, "),
    (next_scale_input, {"codes": torch.zeros(2, 4, 3).half()}, TypeError, "codes: expected torch.float32 like f_hat"),
    (next_scale_input, {"phi_bias": torch.zeros(4)}, ValueError, "phi_bias: expected 2 dimensions"),
    (next_scale_input, {"patch_nums": (1, 2, 8)}, ValueError, "patch_nums: expected the last map .* of f_hat"),
    (next_scale_input, {"k": 3}, ValueError, "k: expected a scale from 0 to 2, got 3"),
    (next_scale_input, {"k": -1}, ValueError, "k: expected a scale from 0 to 2, got -1"),
    (next_scale_input, {"k": 1.0}, ValueError, "k: expected a scale from 0 to 2, got 1.0"),
    (next_scale_input, {"backend": "gpu"}, ValueError, "backend: expected one of auto"),
]


@pytest.mark.parametrize("function, change, error, message", BAD)
def test_bad_input(function, change, error, message):
    arguments = QUANTIZE if function is multi_scale_quantize else STEP
    function(**arguments)  # also fills the cache of schedules, which must not let 2.0 pass for 2
    with pytest.raises(error, match=message):
        function(**arguments | change)


def test_float64_is_served_by_the_reference(cpu):
    tensors = [tensor.double() for tensor in inputs(SMALL)]
    assert multi_scale_quantize(*tensors, SMALL[-1]).f_hat.dtype == torch.float64
    with pytest.raises(ValueError, match="'cpu' cannot serve multi_scale_quantize.*does not take torch.float64"):
        multi_scale_quantize(*tensors, SMALL[-1], backend="cpu")


def test_raw_ops_check_their_arguments(cpu):
    tensors, schedule = raw_inputs()
    ops = torch.ops.var_kernels
    forward, backward = ops._multi_scale_quantize, ops._multi_scale_quantize_backward
    tokens, derrors = torch.zeros(2, 21, dtype=torch.int64), torch.ones(2, 3)
    for wrong in (-1, 5):
        with pytest.raises(RuntimeError, match=f"tokens: expected indices of the codebook, got {wrong}"):
            backward(*tensors, torch.full_like(tokens, wrong), derrors, *schedule, 0.5)
    with pytest.raises(RuntimeError, match="tokens: expected shape"):
        backward(*tensors, tokens[:, :20], derrors, *schedule, 0.5)
    with pytest.raises(RuntimeError, match="derrors: expected shape"):
        backward(*tensors, tokens, derrors[:, :2], *schedule, 0.5)
    with pytest.raises(RuntimeError, match="phi_index: expected an index of phi_weight, got 4"):
        forward(*tensors, *schedule[:2], [0, 1, 4], 0.5, False)
    with pytest.raises(RuntimeError, match="phi_index: expected 3, got 2 entries"):
        forward(*tensors, *schedule[:2], [0, 1], 0.5, False)
    with pytest.raises(RuntimeError, match="heights, widths: expected the full size as last entry"):
        forward(*tensors, [1, 2, 3], *schedule[1:], 0.5, False)
    with pytest.raises(RuntimeError, match="f: expected float32"):
        forward(tensors[0].double(), *tensors[1:], *schedule, 0.5, False)
    with pytest.raises(RuntimeError, match="codes: expected shape"):
        ops._next_scale_input(tensors[0], torch.zeros(2, 3, 3), *tensors[2:], 0, 2, 2, 4, 4, 0.5)


# ---- torch's tools, ISA levels ---------------------------------------------------------------------------------------


def raw_inputs():
    shape = (2, 3, 5, 4, (1, 2, 4))
    return inputs(shape), ([1, 2, 4], [1, 2, 4], [0, 1, 3])


def test_opcheck(cpu):
    tensors, schedule = raw_inputs()
    ops = torch.ops.var_kernels
    torch.library.opcheck(ops._multi_scale_quantize.default, (*tensors, *schedule, 0.5, False))
    channels_last = tensors[0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(ops._multi_scale_quantize.default, (channels_last, *tensors[1:], *schedule, 0.3, True))
    tokens = ops._multi_scale_quantize(*tensors, *schedule, 0.5, False)[0]
    for f in (tensors[0], channels_last):
        arguments = (f, *tensors[1:], tokens, torch.ones(()).expand(2, 3), *schedule, 0.5)
        torch.library.opcheck(ops._multi_scale_quantize_backward.default, arguments)
        for following in ((4, 4), (0, 0)):
            arguments = (f, torch.zeros(2, 4, 3), *tensors[2:], 1, 2, 2, *following, 0.5)
            torch.library.opcheck(ops._next_scale_input.default, arguments)


class Quantizer(torch.nn.Module):
    def forward(self, f, codebook, phi_weight, phi_bias):
        result = multi_scale_quantize(f, codebook, phi_weight, phi_bias, SMALL[-1])
        codes = codebook[result.tokens[:, :4]]
        return *result, *next_scale_input(result.f_hat, codes, phi_weight, phi_bias, SMALL[-1], 0)


def test_compile(backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setattr("var_kernels.backends.BACKENDS", ("reference",))
    compiled = torch.compile(Quantizer(), fullgraph=True, backend="aot_eager")
    tensors = inputs(SMALL)
    with torch.no_grad():
        for part, expected in zip(compiled(*tensors), Quantizer()(*tensors), strict=True):
            torch.testing.assert_close(part, expected)
    results = []
    for module in (compiled, Quantizer()):
        arguments = leaves(tensors)
        _, f_hat, loss, *_ = module(*arguments)
        results.append(torch.autograd.grad((f_hat * f_hat.detach()).sum() + loss, arguments))
    for part, expected in zip(*results, strict=True):
        torch.testing.assert_close(part, expected)


def test_export(cpu):
    tensors = tuple(inputs(SMALL))
    exported = torch.export.export(Quantizer(), tensors)
    assert any("_multi_scale_quantize" in str(node.target) for node in exported.graph.nodes)
    for part, expected in zip(exported.module()(*tensors), Quantizer()(*tensors), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_functional_gradients(backend):
    f, *others = inputs((3, 5, 20, 4, (1, 2, 3)))

    def quantize(f):
        return tuple(multi_scale_quantize(f, *others, (1, 2, 3), backend=backend))

    def step(f):
        return next_scale_input(f, f.flatten(2).mT, *others[1:], (1, 3, 3), 1, backend=backend)

    images = f.unsqueeze(1)
    for function in (quantize, step):
        expected = [function(image) for image in images]
        for part, *parts in zip(torch.vmap(function)(images), *expected, strict=True):
            torch.testing.assert_close(part, torch.stack(parts))

    def loss(*arguments):
        result = multi_scale_quantize(*arguments, (1, 2, 3), backend=backend)
        return result.vq_loss + (result.f_hat * result.f_hat.detach()).sum()

    def gradient(f):
        return torch.func.grad(loss, argnums=(0, 1, 2, 3))(f, *others)

    for part, *parts in zip(torch.vmap(gradient)(images), *map(gradient, images), strict=True):
        torch.testing.assert_close(part, torch.stack(parts))
    arguments = leaves([images[0], *others])
    for part, expected in zip(gradient(images[0]), torch.autograd.grad(loss(*arguments), arguments), strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("level", ("portable", "avx2", "avx512"))
def test_every_lower_isa_level(cpu, level):
    if level not in isa_levels()[:-1]:
        pytest.skip(f"{level} is not below the level of this process")
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "forward_and_backward and l2 or test_next_scale_input or layouts and cpu or every_element"]
    environment = {**os.environ, "VAR_KERNELS_ISA": level}
    answer = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert answer.returncode == 0 and "skipped" not in answer.stdout, answer.stdout[-3000:] + answer.stderr[-2000:]
