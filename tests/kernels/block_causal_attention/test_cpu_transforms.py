"""block_causal_attention on the CPU under opcheck, torch.compile, export, vmap and functional gradients."""

import pytest
import torch

from tests.kernels.block_causal_attention.contract import RAW, with_grads
from var_kernels import block_causal_attention
from var_kernels.testing import attention_inputs, randn


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(cpu, packed):
    if packed:
        q, k, v = randn(2, 14, 3, 2, 8, seed=25).permute(2, 0, 3, 1, 4).unbind()
    else:
        q, k, v = attention_inputs(2, 4, 14, 8, seed=25, kv_heads=2, query_length=9)
    options = ([1, 4, 9], 0.5, 14 - q.shape[2])
    torch.library.opcheck(RAW._block_causal_attention.default, (q, k, v, *options))
    out, lse = RAW._block_causal_attention(q, k, v, *options)
    for dlse in (None, torch.ones_like(lse)):
        arguments = (torch.ones_like(out), q, k, v, out, lse, dlse, *options)
        torch.library.opcheck(RAW._block_causal_attention_backward.default, arguments)


@pytest.mark.parametrize(
    ("backend", "compiler", "dynamic"),
    [
        ("cpu", "aot_eager", False),
        ("cpu", "aot_eager", True),
        pytest.param("cpu", "inductor", False, marks=pytest.mark.evidence),
        ("reference", "aot_eager", False),
    ],
    indirect=["backend"],
)
def test_compile(backend, compiler, dynamic):
    torch._dynamo.reset()
    inputs = attention_inputs(2, 2, 14, 8, seed=26)
    dout = randn(2, 2, 14, 8, seed=27)

    def attention(q, k, v):
        out, lse = block_causal_attention(q * 2, k, v, (1, 4, 9), backend=backend, return_lse=True)
        return out * lse.unsqueeze(-1)

    compiled = torch.compile(attention, fullgraph=True, backend=compiler, dynamic=dynamic)
    results = (with_grads(f, inputs, dout) for f in (compiled, attention))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(compiled(*inputs), attention(*inputs))


def test_export(backend):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return block_causal_attention(q, k, v, (1, 4, 9), backend=backend)

    inputs = attention_inputs(2, 2, 14, 8, seed=28, query_length=9)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(Attention(), inputs, dynamic_shapes=({0: batch[0]},) * 3)
    larger = attention_inputs(5, 2, 14, 8, seed=29, query_length=9)
    for arguments in (inputs, larger):
        torch.testing.assert_close(program.module()(*arguments), Attention()(*arguments))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_functional_gradients(backend):
    inputs = [torch.stack([x, x.flip(2), x * 0.5]) for x in attention_inputs(2, 2, 14, 8, seed=30)]

    def attention(q, k, v):
        return block_causal_attention(q, k, v, (1, 4, 9), backend=backend)

    def loss(q, k, v):
        return attention(q, k, v).square().sum()

    samples = list(zip(*inputs, strict=True))
    expected = torch.stack([attention(*sample) for sample in samples])
    torch.testing.assert_close(torch.vmap(attention)(*inputs), expected)
    shared = torch.vmap(attention, in_dims=(0, None, None))(inputs[0], inputs[1][0], inputs[2][0])
    torch.testing.assert_close(shared[0], expected[0])

    per_sample = [torch.stack(g) for g in zip(*(torch.func.grad(loss, (0, 1, 2))(*s) for s in samples), strict=True)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    sum(loss(*sample) for sample in zip(*leaves, strict=True)).backward()
    for grad, leaf in zip(per_sample, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss, (0, 1, 2)))(*inputs), tuple(per_sample))
    through = torch.func.grad(lambda *x: torch.vmap(loss)(*x).sum(), (0, 1, 2))(*inputs)
    torch.testing.assert_close(through, tuple(per_sample))


def test_second_derivatives_are_refused(cpu):
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 1, 5, 8, seed=31))
    (grad,) = torch.autograd.grad(block_causal_attention(q, k, v, (1, 4)).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
