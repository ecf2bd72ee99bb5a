"""multi_scale_quantize and next_scale_input: tokens, values and gradients against an independent composition."""

import functools

import numpy
import pytest
import torch
import torch.nn.functional as F

from tests.kernels.multi_scale_quantize.contract import (
    SHAPES,
    SMALL,
    assert_exact_far_from_the_origin,
    assert_right,
    assert_right_step,
    composition,
    gradients,
    inputs,
    leaves,
    pairs,
)
from var_kernels import multi_scale_quantize, next_scale_input
from var_kernels.multi_scale_quantize import phi_index
from var_kernels.testing import poison, randn

# ---- the specification -----------------------------------------------------------------------------------------------


def test_phi_index_is_that_of_numpy():
    for n in range(1, 14):
        ticks = numpy.linspace(1 / 3 / n, 1 - 1 / 3 / n, n) if n == 4 else numpy.linspace(1 / 2 / n, 1 - 1 / 2 / n, n)
        for scales in range(2, 15):
            for k in range(scales):
                assert phi_index(k, scales, n) == numpy.argmin(numpy.abs(ticks - k / (scales - 1))), (k, scales, n)
        assert phi_index(0, 1, n) == 0
    # In the released models, scales 2 and 7 lie halfway between two ticks, where rounding decides.
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


def test_codes_far_from_the_origin(backend):
    assert_exact_far_from_the_origin(functools.partial(multi_scale_quantize, backend=backend))


def test_gradcheck_of_the_codebook_part():
    # With beta 0, the loss depends on codebook and phi only, and autograd gives its true derivative.
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
    arguments = leaves(tensors)
    ours = multi_scale_quantize(*arguments, shape[-1], metric=metric, backend="cpu")
    gap = composition(*(tensor.double() for tensor in tensors), shape[-1], metric=metric)[-1]
    assert gap > 1e-5, "a near-tie that float32 may not resolve: choose another seed"
    plain_tokens = assert_right(ours, gradients(ours, arguments), tensors, shape[-1], metric=metric)
    assert torch.equal(ours.tokens, plain_tokens)


@pytest.mark.parametrize("name", SHAPES)
def test_next_scale_input(cpu, name):
    shape = SHAPES[name]
    f_hat, _, *phi = inputs(shape)
    for k, (height, width) in enumerate(pairs(shape[-1])):
        tensors = (f_hat, randn(shape[0], height * width, shape[1], seed=20 + k), *phi)
        ours = next_scale_input(*tensors, shape[-1], k, phi_ratio=0.4, backend="cpu")
        assert_right_step(ours, tensors, shape[-1], k, phi_ratio=0.4)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
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


def test_equal_for_any_number_of_threads(cpu, restore_threads):
    # The problem is large enough for threads: phi has 19 images · 81 pixels · 9 · 48² multiply-adds. The 19 images make
    # several groups, and the last one is not full.
    shape = (19, 40, 200, 4, (1, 2, 4, 9))
    tensors, results = inputs(shape), []
    codes = randn(19, 16, 40, seed=7)
    for count in (1, 2, 3, 4, 1):
        torch.set_num_threads(count)
        arguments = leaves(tensors)
        result = multi_scale_quantize(*arguments, shape[-1], backend="cpu")
        step = next_scale_input(tensors[0], codes, *tensors[2:], shape[-1], 2, backend="cpu")
        results.append((*result, *gradients(result, arguments), *step))
    for result in results[1:]:
        assert all(torch.equal(part, first) for part, first in zip(result, results[0], strict=True))


def test_an_image_does_not_depend_on_its_batch(cpu):
    f, *others = inputs(SHAPES["nine images"])
    whole = multi_scale_quantize(f, *others, SHAPES["nine images"][-1], backend="cpu")
    for i in range(9):
        alone = multi_scale_quantize(f[i : i + 1], *others, SHAPES["nine images"][-1], backend="cpu")
        assert torch.equal(alone.tokens[0], whole.tokens[i]) and torch.equal(alone.f_hat[0], whole.f_hat[i])
