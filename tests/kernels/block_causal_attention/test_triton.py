"""The Triton kernels of block_causal_attention, executed on a CPU in two ways.

Triton's interpreter runs the source (fp32, fp16). The PTX interpreter runs the code compiled for sm_80 (bf16 as well).
"""

import contextlib
import functools

import pytest
import torch

pytest.importorskip("triton")

from tests.helpers.triton_launches import recorded  # noqa: E402
from tests.kernels.block_causal_attention.contract import check, references, with_grads  # noqa: E402
from tools.gpu_emulation.triton import executing, interpret, run_ptx  # noqa: E402
from var_kernels import block_causal_attention  # noqa: E402
from var_kernels.testing import assert_accurate, attention_inputs, poison, randn, stated_order  # noqa: E402
from var_kernels.triton import block_causal_attention as kernels  # noqa: E402
from var_kernels.triton import configs  # noqa: E402
from var_kernels.triton.configs import Config  # noqa: E402
from var_kernels.triton.offline import compilations, compile_for  # noqa: E402
from var_kernels.triton.targets import TARGETS  # noqa: E402

RAW = torch.ops.var_kernels_triton
KERNELS = (kernels.forward, kernels.backward_queries, kernels.backward_keys)
SMALL_TILES = {
    "block_causal_attention.forward": Config({"BLOCK_M": 16, "BLOCK_N": 32}),
    "block_causal_attention.backward_queries": Config({"BLOCK_M": 32, "BLOCK_N": 16}),
    "block_causal_attention.backward_keys": Config({"BLOCK_M": 16, "BLOCK_N": 32}),
}
SHORT = (1, 4, 9, 16, 25)  # 55 tokens
# With small tiles, a tile has several scales, one, or parts of two. Some blocks of keys end with a tile, others do not.
SCHEDULES = {
    "one token": (1,),
    "shorter than a tile": (1, 4, 9),
    "whole tiles": (16, 16, 32),
    "a tile and one row": (16, 17, 1, 33),
    "a large scale first": (35, 2, 10),
    "plain causal": (1,) * 35,
    "one scale": (49,),
}


@pytest.fixture
def matmul():
    """torch.backends.cuda.matmul, whose setting is restored after the test."""
    settings = torch.backends.cuda.matmul
    previous = settings.fp32_precision
    yield settings
    settings.fp32_precision = previous


@contextlib.contextmanager
def small(execute=interpret):
    with executing(execute), configs.override(SMALL_TILES):
        yield


def three_ways(inputs, lens, **options):
    """For out and lse: the result of the kernels, of the reference in the dtype of the inputs, and in float64."""
    with small():
        ours = block_causal_attention(*inputs, lens, backend="triton", return_lse=True, **options)
    return list(zip(ours, *references(inputs, lens, **options), strict=True))


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    lens = SCHEDULES[schedule]
    with small():
        check(attention_inputs(1, 2, sum(lens), 16, seed=1), lens, backend="triton")


# 16 is the smallest block. 24 and 72 are no powers of two, and 126 is no multiple of 4, which narrows the accesses.
@pytest.mark.parametrize("head_dim", [1, 24, 72, 126])
def test_head_dims(head_dim):
    dtype = torch.float16 if head_dim % 8 == 0 else torch.float32
    with small():
        check(attention_inputs(1, 1, 30, head_dim, seed=head_dim, dtype=dtype), SHORT[:4], backend="triton")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "lens"),
    [
        (64, torch.float16, (*SHORT, 36, 9)),
        (128, torch.float16, (*SHORT, 36, 9)),
        (64, torch.float32, (*SHORT, 36)),
        (256, torch.float32, SHORT[:4]),
    ],
)
def test_shipped_tiles(head_dim, dtype, lens):
    with executing(interpret):
        check(attention_inputs(1, 1, sum(lens), head_dim, seed=2, dtype=dtype), lens, backend="triton")


@pytest.mark.parametrize(
    ("queries", "q_offset"), [(1, None), (25, None), (26, None), (16, 14), (1, 0), (12, 7), (20, 30)]
)
def test_query_ranges(queries, q_offset):
    inputs = attention_inputs(1, 2, 55, 16, seed=3, query_length=queries)
    with small():
        check(inputs, SHORT, backend="triton", q_offset=q_offset, rows_cancel=queries < 8)


@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(6, 2, 30), (3, 1, 18)])
def test_grouped_heads(heads, kv_heads, queries):
    inputs = attention_inputs(2, heads, 30, 16, seed=4, kv_heads=kv_heads, query_length=queries)
    with small():
        check(inputs, SHORT[:4], backend="triton")


def test_sections_of_heads(monkeypatch):
    """There are more heads than fit in the L2 cache together, and the last section is not full."""
    monkeypatch.setattr(kernels, "_SECTION_BYTES", 2 * 2 * 30 * 16 * 4)
    with small():
        check(attention_inputs(1, 5, 30, 16, seed=5), SHORT[:4], backend="triton")


@pytest.mark.parametrize(("dtype", "execute"), [(torch.float16, interpret), (torch.float32, run_ptx)])
def test_large_logits(dtype, execute):
    """With logits of standard deviation 30, up to about 120, rows are nearly one-hot, and most gradients cancel.

    fp32 needs that an fma rounds once. Triton's interpreter rounds twice, so that the compiled code runs in fp32.
    """
    inputs = attention_inputs(1, 1, 39, 32, seed=6, dtype=dtype, logit_std=30.0)  # two blocks of keys
    with small(execute):
        check(inputs, (1, 4, 9, 25), backend="triton", rows_cancel=True)


@pytest.mark.parametrize("softmax_scale", [1.0, -0.05])
def test_softmax_scale(softmax_scale):
    with small():
        check(attention_inputs(1, 1, 55, 16, seed=7), SHORT, backend="triton", softmax_scale=softmax_scale)


def test_softmax_scale_zero():
    inputs = attention_inputs(1, 1, 30, 16, seed=8)
    (out, lse) = three_ways(inputs, SHORT[:4], softmax_scale=0.0)
    assert_accurate(*out)
    assert_accurate(*lse)
    with small():
        gradients = with_grads(
            lambda *x: block_causal_attention(*x, SHORT[:4], softmax_scale=0.0, backend="triton"), inputs, inputs[0]
        )
    assert not gradients[1].any() and not gradients[2].any() and gradients[3].isfinite().all()


def test_log_sum_exp_and_its_gradient():
    inputs = attention_inputs(1, 2, 30, 16, seed=9)
    dout, dlse = randn(1, 2, 30, 16, seed=10), randn(1, 2, 30, seed=11)

    def run(backend, dtype, use_out):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, lse = block_causal_attention(*leaves, SHORT[:4], backend=backend, return_lse=True)
        loss = (lse * dlse.to(dtype)).sum() + ((out * dout.to(dtype)).sum() if use_out else 0)
        return [lse.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)]

    for use_out in (True, False):
        with small():
            ours = run("triton", torch.float32, use_out)
        with stated_order():
            references = [run("reference", dtype, use_out) for dtype in (torch.float32, torch.float64)]
        for name, *results in zip(("lse", "dq", "dk", "dv"), ours, *references, strict=True):
            # Row 0 sees one key, so that its gradient through out is 0. Its gradient through lse is a rounding error.
            assert_accurate(*(x.flatten() for x in results), name=name)


# ---- special values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_non_finite_values_propagate(where, value):
    """They propagate as in PyTorch to rows that see them. The last scale has the bad token, and tiles of its own."""
    q, k, v = attention_inputs(1, 1, 62, 16, seed=12)
    {"q": q, "k": k, "v": v}[where][0, 0, -5] = value
    for part in three_ways((q, k, v), (1, 4, 9, 16, 32)):
        assert_accurate(*part)


@pytest.mark.parametrize("bad_keys", [5, 30])
def test_rows_that_see_only_minus_infinity(bad_keys):
    q, k, v = attention_inputs(1, 1, 30, 16, seed=13)
    q[..., 0] = q[..., 0].abs() + 0.1
    k[:, :, :bad_keys, 0] = -float("inf")
    out, lse = three_ways((q, k, v), SHORT[:4])
    assert_accurate(*out)
    assert_accurate(*lse)
    assert out[0].isnan().any(-1).sum() == bad_keys and (lse[0] == -float("inf")).sum() == bad_keys


def test_keys_that_no_query_sees_have_zero_gradients():
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 1, 55, 16, seed=14, query_length=10))
    poison(k)
    with small():
        block_causal_attention(q, k, v, SHORT, q_offset=0, backend="triton").sum().backward()
    for grad in (k.grad, v.grad):
        assert (grad[:, :, 14:] == 0).all() and (grad[:, :, :14] != 0).any()


# ---- the compiled code ---------------------------------------------------------------------------------------------


# bf16 runs only here, because Triton's interpreter does not have it. The cases have the shipped tiles, tokens that fill
# no block, masked columns, grouped heads against a cache, and views of one packed tensor.
@pytest.mark.parametrize(
    ("head_dim", "dtype", "lens", "heads", "queries"),
    [
        (64, torch.bfloat16, (1, 4, 9, 16, 36, 49), 1, 115),
        (126, torch.bfloat16, (1, 4, 9), 2, 10),
        (72, torch.float16, (1, 4, 9), 1, 14),
        (16, torch.float32, (1, 4, 9, 16), 1, 30),
    ],
)
def test_compiled_code(head_dim, dtype, lens, heads, queries):
    packed = randn(1, sum(lens), 3 * heads, head_dim, seed=15, dtype=dtype).transpose(1, 2)
    inputs = packed[:, :heads, -queries:], packed[:, -2:-1], packed[:, -1:]
    with executing(run_ptx):
        check(inputs, lens, backend="triton")


def test_no_compilation_for_another_schedule_batch_or_offset():
    """Each kernel is compiled once for all sizes, which are 1, multiples of 16 and others, scales and positions."""
    problems = [
        ((1, 4, 9), 14, 1, 1, 1.0), ((16, 16), 32, 2, 4, 0.25), ((1,) * 7, 7, 1, 3, 1.0), ((5, 11, 21), 16, 3, 2, 0.5),
        ((1, 1), 1, 1, 16, -1.0), ((100, 156), 129, 16, 1, 2.0),
    ]  # fmt: skip

    def train():
        for lens, queries, batch, heads, softmax_scale in problems:
            inputs = attention_inputs(batch, heads, sum(lens), 24, seed=16, query_length=queries, dtype=torch.float16)
            leaves = [x.requires_grad_() for x in inputs]
            out = block_causal_attention(*leaves, lens, softmax_scale=softmax_scale, backend="triton")
            out.sum().backward()

    launches = recorded(train)
    before = [compilations(kernel, TARGETS["sm_80"]) for kernel in KERNELS]
    for launch in launches:
        compile_for(launch, TARGETS["sm_80"])
    assert len(launches) == 3 * len(problems)
    assert [compilations(kernel, TARGETS["sm_80"]) for kernel in KERNELS] == [count + 1 for count in before]


@pytest.mark.parametrize(
    ("allowed", "target", "dtype", "precision"),
    [
        ("ieee", "sm_80", torch.float32, "ieee"),
        ("tf32", "sm_80", torch.float32, "tf32"),
        ("tf32", "sm_80", torch.bfloat16, "ieee"),
        ("tf32", "gfx942", torch.float32, "ieee"),
    ],
)
def test_tf32_only_where_torch_allows_it(matmul, allowed, target, dtype, precision):
    matmul.fp32_precision = allowed
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 1, 14, 16, seed=26, dtype=dtype))
    launches = recorded(
        lambda: block_causal_attention(q, k, v, SHORT[:3], backend="triton").sum().backward(), target
    )
    assert [launch.arguments["PRECISION"] for launch in launches] == [precision] * 3


# ---- contract ------------------------------------------------------------------------------------------------------


def test_bit_equal_across_runs():
    inputs = attention_inputs(1, 2, 55, 16, seed=17)
    results = []
    for _ in range(2):
        poison(*inputs)
        with small():
            attention = functools.partial(block_causal_attention, scale_lens=SHORT, backend="triton")
            results.append(with_grads(attention, inputs, inputs[0]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_views_of_packed_qkv():
    """Views of a fused qkv Linear need no copy, and out has the layout that the following projection needs."""
    packed = randn(2, 30, 3, 2, 24, seed=18).requires_grad_()
    dout = randn(2, 2, 30, 24, seed=19)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    with small():
        out = block_causal_attention(q, k, v, SHORT[:4], backend="triton")
        (grad,) = torch.autograd.grad(out, packed, dout)
        dense = [x.detach().contiguous() for x in (q, k, v)]
        expected = with_grads(lambda *x: block_causal_attention(*x, SHORT[:4], backend="triton"), dense, dout)
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, expected[0])
    assert torch.equal(grad.permute(2, 0, 3, 1, 4), torch.stack(expected[1:]))


VIEWS = {
    "strided inner dimension": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1, :, :1].expand(2, -1, 14, -1),
    "unaligned rows": lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5],
    "heads inside tokens": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dense": lambda x: x,
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_inputs(view):
    """Each tensor, dout included, has other strides. dq, dk and dv get the layouts of q, k and v."""
    layouts = [*VIEWS.values()]
    inputs = [*attention_inputs(2, 2, 14, 24, seed=20), randn(2, 2, 14, 24, seed=21)]
    first = [*VIEWS].index(view)
    views = [layouts[(first + i) % len(layouts)](x) for i, x in enumerate(inputs)]
    attention = functools.partial(block_causal_attention, scale_lens=SHORT[:3], backend="triton")
    results = []
    for *tensors, dout in (views, [x.contiguous() for x in views]):
        with small():
            results.append(with_grads(attention, tensors, dout))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_far_apart(monkeypatch):
    """Offsets inside a tile are 32-bit numbers, which overflow if rows are too far apart."""
    monkeypatch.setattr(kernels, "_FAR", 50)
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in attention_inputs(1, 4, 14, 16, seed=21)]
    assert inputs[0].stride(2) == 64
    with small():
        check(inputs, SHORT[:3], backend="triton")
        out = block_causal_attention(*inputs, SHORT[:3], backend="triton")
    assert out.stride() == inputs[0].stride()


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_empty(batch, queries):
    q, k, v = (x.requires_grad_() for x in attention_inputs(batch, 2, 5, 8, seed=22, query_length=queries))
    with small():
        out, lse = block_causal_attention(q, k, v, (1, 4), return_lse=True, backend="triton")
        (out.sum() + lse.sum()).backward()
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in (q, k, v))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    if packed:
        q, k, v = randn(2, 14, 3, 2, 8, seed=23).permute(2, 0, 3, 1, 4).unbind()
    else:
        q, k, v = attention_inputs(2, 4, 14, 8, seed=23, kv_heads=2, query_length=9)
    options = ([1, 4, 9], 0.5, 14 - q.shape[2])
    with small():
        torch.library.opcheck(RAW._block_causal_attention.default, (q, k, v, *options))
        out, lse = RAW._block_causal_attention(q, k, v, *options)
        arguments = (torch.ones_like(out), q, k, v, out, lse, torch.ones_like(lse) if packed else None, *options)
        torch.library.opcheck(RAW._block_causal_attention_backward.default, arguments)


def test_raw_op_checks_what_it_is_given():
    q, k, v = attention_inputs(1, 2, 14, 8, seed=24)
    for message, arguments in {
        "scale_lens: expected the sum 14": (q, k, v, [1, 4], 1.0, 0),
        "q_offset: expected 0 to 14 - 14": (q, k, v, [14], 1.0, 1),
        "v: expected shape": (q, k, v[:, :, 1:], [14], 1.0, 0),
        "k: expected a dense last dimension": (q, k.mT.contiguous().mT, v, [14], 1.0, 0),
    }.items():
        with small(), pytest.raises(ValueError, match=message):
            RAW._block_causal_attention(*arguments)


def test_compile():
    torch._dynamo.reset()
    inputs = attention_inputs(1, 2, 14, 8, seed=25)

    def attention(q, k, v):
        out, lse = block_causal_attention(q * 2, k, v, (1, 4, 9), backend="triton", return_lse=True)
        return out * lse.unsqueeze(-1)

    with small():
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
        results = (with_grads(f, inputs, inputs[0]) for f in (compiled, attention))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


def test_inputs_that_overlap_themselves():
    """For such a q, torch.empty_like gives a tensor whose last dimension is not dense."""
    lens = (1, 4, 7)
    memory = randn(80, seed=7)
    q = memory.as_strided((1, 1, 12, 16), (1, 1, 1, 1))
    k, v = (randn(1, 1, 12, 16, seed=seed) for seed in (8, 9))
    with small():
        found = block_causal_attention(q, k, v, lens, backend="triton")
        expected = block_causal_attention(q.contiguous(), k, v, lens, backend="triton")
    assert torch.equal(found, expected)
