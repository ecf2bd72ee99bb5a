"""torch.compile(dynamic=True) compiles an op once for all the sizes, schedules and positions that it is called with."""

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import var_kernels as vk
from var_kernels.testing import attention_inputs, modulation, randn

# Schedules of 3 to 5 scales, four of each. A length of 1 is a constant of the compiled code, so all begin with one.
SCHEDULES = [tuple([1, *(3 + i * k for k in range(1, count))]) for count in (3, 4, 5) for i in range(4)]
# 2 to 13 scales, as the steps of a generation see them. torch.compile gives up at the ninth compilation of a function.
PREFIXES = [tuple(side * side for side in range(1, count + 1)) for count in range(2, 14)]


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counted(function):
    """`function`, compiled without breaks for any sizes, and a function that counts its compilations."""
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    # The number of calls of the compiler's backend is larger: it starts again after it has met a float.
    return compiled, lambda: len(_debug_get_cache_entry_list(function))


def attention(q, k, v, scale_lens):
    out, lse = vk.block_causal_attention(q * 2, k, v, scale_lens, return_lse=True)
    return out * lse.unsqueeze(-1)


def results(function, lens, scale_lens, gradients):
    inputs = attention_inputs(2, 2, sum(lens), 8, seed=sum(lens))
    if not gradients:
        return (function(*inputs, scale_lens),)
    leaves = [x.requires_grad_() for x in inputs]
    out = function(*leaves, scale_lens)
    return out, *torch.autograd.grad(out.sum(), leaves)


@pytest.mark.parametrize("gradients", [False, True])
def test_one_compilation_of_attention_for_a_number_of_scales(cpu, gradients):
    compiled, compilations = counted(attention)
    for lens in SCHEDULES:
        torch.testing.assert_close(
            results(compiled, lens, lens, gradients), results(attention, lens, lens, gradients)
        )  # fmt: skip
    assert compilations() == 3


@pytest.mark.parametrize("gradients", [False, True])
def test_one_compilation_of_attention_for_all_schedules_in_tensors(cpu, gradients):
    compiled, compilations = counted(attention)
    for lens in (*SCHEDULES, *PREFIXES):
        schedule = torch.tensor(lens)
        torch.testing.assert_close(
            results(compiled, lens, schedule, gradients), results(attention, lens, lens, gradients)
        )  # fmt: skip
        torch.testing.assert_close(attention(*attention_inputs(1, 1, sum(lens), 4, seed=1), schedule),
                                   attention(*attention_inputs(1, 1, sum(lens), 4, seed=1), lens))  # fmt: skip
    assert compilations() == 1


def test_compilations_of_a_cached_loop(cpu):
    """Each step has one scale of queries, and the keys of one scale more than the step before."""

    @torch.no_grad()
    def step(qkv, factor, k_cache, v_cache, start, scale_lens):
        q = vk.qk_norm_cache(qkv, k_cache, v_cache, start, q_factor=factor)
        end = start + qkv.shape[1]
        return vk.block_causal_attention(q, k_cache[:, :, :end], v_cache[:, :, :end], scale_lens)

    compiled, compilations = counted(step)
    lens = PREFIXES[-1]
    inputs = [randn(2, length, 3, 2, 8, seed=length) for length in lens]
    outputs = []
    for function in (step, compiled):
        caches, start = torch.zeros(2, 2, 2, sum(lens), 8), 0
        for k, qkv in enumerate(inputs):
            outputs.append(function(qkv, torch.ones(2), *caches, start, torch.tensor(lens[: k + 1])))
            start += qkv.shape[1]
    for expected, found in zip(outputs[: len(lens)], outputs[len(lens) :], strict=True):
        torch.testing.assert_close(found, expected)
    # The first two steps have one token, no token before them, or one: these numbers are constants of compiled code.
    assert compilations() <= 3


def test_tensors_of_lengths_are_checked(cpu):
    q, k, v = attention_inputs(1, 1, 14, 8, seed=1)
    with pytest.raises(TypeError, match="scale_lens: expected ints, or a tensor of int64, got torch.float32"):
        attention(q, k, v, torch.tensor([1.0, 4.0, 9.0]))
    with pytest.raises(ValueError, match=r"scale_lens: expected shape \(K,\) on the CPU, got \(1, 3\) on cpu"):
        attention(q, k, v, torch.tensor([[1, 4, 9]]))
    with pytest.raises(ValueError, match="scale_lens: expected lengths that sum to the 14 keys"):
        attention(q, k, v, torch.tensor([1, 4]))
    compiled, _ = counted(attention)
    for lens, message in (([1, 4], "that sum to 14, got 5"), ([1, -1, 14], "lengths > 0, got -1"), ([], "got 0")):
        with pytest.raises(RuntimeError, match=f"scale_lens: expected lengths.*{message}|{message}"):
            compiled(q, k, v, torch.tensor(lens, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="scale_lens: expected no ints beside a tensor"):
        torch.ops.var_kernels._block_causal_attention(q, k, v, [1, 4, 9], 1.0, 0, False, torch.tensor([1, 4, 9]))


def adaln(x, branch, gate, scale, shift):
    residual, y = vk.gated_residual_adaln(x, branch, gate, scale, shift)
    return residual + vk.adaln_layer_norm(y, scale, shift)


def test_one_compilation_of_adaln_for_all_batches_and_lengths(cpu):
    compiled, compilations = counted(adaln)
    for batch, length in ((2, 5), (3, 60), (7, 2), (2, 100)):
        tensors = [randn(batch, length, 24, seed=seed).requires_grad_() for seed in (1, 2)]
        tensors += modulation(batch, 24, seed=3)
        found, expected = compiled(*tensors), adaln(*tensors)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), tensors[:2]), torch.autograd.grad(expected.sum(), tensors[:2])
        )
    assert compilations() == 1


def test_one_compilation_of_the_search_for_all_numbers_of_rows(cpu):
    compiled, compilations = counted(vk.nearest_code)
    for rows, codes in ((2, 30), (50, 31), (3, 40), (100, 30)):
        z, codebook = randn(rows, 8, seed=rows), randn(codes, 8, seed=codes)
        assert torch.equal(compiled(z, codebook), vk.nearest_code(z, codebook))
    assert compilations() == 1


def test_one_compilation_of_sampling_for_all_positions(cpu):
    def sample(logits, seeds, top_k, offset):
        return vk.sample_tokens(logits, top_k=top_k, top_p=0.9, seeds=seeds, offset=offset)

    compiled, compilations = counted(sample)
    seeds = torch.arange(2)
    for length, vocab, top_k, offset in ((4, 50, 9, 5), (9, 50, 9, 14), (16, 60, 20, 30), (2, 50, 3, 100)):
        logits = randn(2, length, vocab, seed=length)
        assert torch.equal(compiled(logits, seeds, top_k, offset), sample(logits, seeds, top_k, offset))
    assert compilations() == 1


@pytest.mark.parametrize("gradients", [False, True])
def test_one_compilation_of_the_quantizer_for_a_number_of_scales(cpu, gradients):
    def quantize(f, codebook, weight, bias, maps):
        found = vk.multi_scale_quantize(f, codebook, weight, bias, maps)
        return found.f_hat.sum() + found.vq_loss

    compiled, compilations = counted(quantize)
    parameters = randn(20, 6, seed=2), randn(3, 6, 6, 3, 3, seed=3), randn(3, 6, seed=4)
    for maps in ((2, 4, 7), (3, 5, 9), (2, (3, 4), (6, 8)), (2, (5, 7), (9, 8))):
        height, width = maps[-1] if isinstance(maps[-1], tuple) else (maps[-1],) * 2
        f = randn(2, 6, height, width, seed=1).requires_grad_(gradients)
        found, expected = compiled(f, *parameters, maps), quantize(f, *parameters, maps)
        torch.testing.assert_close(found, expected)
        if gradients:
            torch.testing.assert_close(torch.autograd.grad(found, f), torch.autograd.grad(expected, f))
    assert compilations() == 2  # maps are ints, or pairs


def test_one_compilation_of_a_step_for_a_scale(cpu):
    def step(f_hat, codes, weight, bias, maps, k):
        return vk.next_scale_input(f_hat, codes, weight, bias, maps, k)

    compiled, compilations = counted(step)
    phi = randn(3, 6, 6, 3, 3, seed=3), randn(3, 6, seed=4)
    for maps in ((2, 4, 7), (3, 5, 9), (2, 3, 6)):
        for k, side in enumerate(maps):
            arguments = randn(2, 6, maps[-1], maps[-1], seed=1), randn(2, side * side, 6, seed=2), *phi, maps, k
            torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert compilations() == 3  # one for each k
