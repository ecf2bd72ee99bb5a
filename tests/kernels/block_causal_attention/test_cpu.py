"""block_causal_attention on the CPU: accuracy against the float64 reference, special values, layouts, arguments."""


import pytest
import torch
import torch.nn.functional as F

from tests.kernels.block_causal_attention.contract import RAW, check, with_grads
from var_kernels import block_causal_attention
from var_kernels.testing import assert_accurate, attention_inputs, poison, randn, scale_lens, stated_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Every head dimension in use. 1, 126 and 200 are no whole vectors at any ISA level; 256 is the limit.
HEAD_DIMS = (1, 8, 16, 40, 64, 72, 96, 104, 120, 126, 128, 200, 256)
# Tokens per scale. The kernels work in tiles of up to 48 query rows (32 with AMX, 96 in the backward of bf16), which
# small scales share, in units of 16 rows, and in steps of 64 keys. The schedules straddle each of these numbers.
SCHEDULES = {
    "one token": (1,),
    "shorter than a vector": (1, 4, 9),
    "small scales fill tiles": (23, 23, 23, 1, 1, 24, 7),
    "a tile and one row": (48, 49, 1),
    "wide maps": (1, 6, 15, 28, 60, 91),
    "a large scale first": (129, 2, 64, 63),
    "plain causal": (1,) * 131,
    "one scale": (193,),
    "256px": scale_lens("256px"),
}
SHORT = (1, 4, 9, 16, 25, 36, 64)  # 155 tokens


# ---- accuracy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(cpu, head_dim, dtype):
    check(attention_inputs(1, 2, sum(SHORT), head_dim, seed=head_dim, dtype=dtype), SHORT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [155, 3])
@pytest.mark.parametrize("head_dim", [1, 40, 64, 126])
def test_head_dims_of_many_and_few_queries(cpu, head_dim, queries, dtype):
    inputs = attention_inputs(2, 4, sum(SHORT), head_dim, seed=1, dtype=dtype, query_length=queries)
    check(inputs, SHORT, rows_cancel=queries < 8)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(cpu, schedule, dtype):
    lens = SCHEDULES[schedule]
    check(attention_inputs(2, 1, sum(lens), 64, seed=1, dtype=dtype), lens)


# Query ranges at the end (a step against a cache), in the middle and at the start. 1, 4 and 5 rows straddle the limit
# of the path that does not pack K, 48 and 49 that of a single tile. Those at 7 and 90 begin and end inside a scale.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "q_offset"),
    [(1, None), (4, None), (5, None), (48, None), (49, None), (64, None), (1, 0), (30, 7), (3, 29), (60, 90), (36, 55)],
)
def test_query_ranges(cpu, queries, q_offset, dtype):
    inputs = attention_inputs(2, 4, sum(SHORT), 40, seed=2, dtype=dtype, query_length=queries)
    check(inputs, SHORT, q_offset=q_offset, rows_cancel=queries < 8)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "queries"), [(6, 2, 155), (4, 1, 155), (4, 2, 1), (3, 1, 50)])
def test_grouped_heads(cpu, heads, kv_heads, queries, dtype):
    inputs = attention_inputs(2, heads, 155, 24, seed=3, dtype=dtype, kv_heads=kv_heads, query_length=queries)
    check(inputs, SHORT, rows_cancel=queries < 8)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("queries", [3, 60])
def test_grouped_heads_over_many_keys(cpu, queries, dtype):
    # The keys are divided into ranges, each of which has a share of dq for every head of a group. The softmax goes
    # through the keys in several blocks, in which the scores grow, so that what came before is rescaled.
    q, k, v = attention_inputs(1, 4, 755, 24, seed=6, dtype=dtype, kv_heads=2, query_length=queries)
    k[:, :, 300:] *= 3
    check((q, k, v), (*SHORT, 600), rows_cancel=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(cpu, dtype):
    """With logits of standard deviation 30, up to about 120, rows are nearly one-hot, and most gradients cancel."""
    inputs = attention_inputs(1, 2, sum(SHORT), 64, seed=4, dtype=dtype, logit_std=30.0)
    check(inputs, SHORT, rows_cancel=True)


def test_softmax_scale(cpu):
    check(attention_inputs(1, 2, sum(SHORT), 64, seed=5), SHORT, softmax_scale=1.0)
    check(attention_inputs(1, 2, sum(SHORT), 64, seed=5), SHORT, softmax_scale=-0.05)


def test_all_scales_of_length_one_is_causal_attention(backend):
    q, k, v = attention_inputs(1, 2, 100, 32, seed=6)
    out = block_causal_attention(q, k, v, [1] * 100, backend=backend)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    with stated_order():
        same = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_accurate(out, same, exact)


def test_one_scale_is_full_attention(backend):
    q, k, v = attention_inputs(1, 2, 100, 32, seed=7)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    out = block_causal_attention(q, k, v, [100], backend=backend)
    with stated_order():
        same = F.scaled_dot_product_attention(q, k, v)
    assert_accurate(out, same, exact)


@pytest.mark.parametrize("queries", [155, 3])
def test_log_sum_exp_and_its_gradient(cpu, queries):
    inputs = attention_inputs(2, 2, 155, 40, seed=8, query_length=queries)
    dout, dlse = randn(2, 2, queries, 40, seed=9), randn(2, 2, queries, seed=10)

    def run(backend, dtype, use_out):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out, lse = block_causal_attention(*leaves, SHORT, backend=backend, return_lse=True)
        loss = (lse * dlse.to(dtype)).sum() + ((out * dout.to(dtype)).sum() if use_out else 0)
        return [lse.detach(), *torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)]

    for use_out in (True, False):  # if out is not used, backward gets None for its gradient
        results = [run("cpu", torch.float32, use_out)]
        with stated_order():
            results += [run("reference", dtype, use_out) for dtype in (torch.float32, torch.float64)]
        for name, a, s, e in zip(("lse", "dq", "dk", "dv"), *results, strict=True):
            # Row 0 sees one key, so that its gradient through out is 0. Its gradient through lse is a rounding error.
            assert_accurate(a.flatten(), s.flatten(), e.flatten(), name=name)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_log_sum_exp_is_fp32_for_half_precision(cpu, dtype):
    q, k, v = attention_inputs(2, 2, 155, 40, seed=8, dtype=dtype)
    lse = block_causal_attention(q, k, v, SHORT, return_lse=True, backend="cpu")[1]
    widened = [x.float() for x in (q, k, v)]
    with stated_order():
        same = block_causal_attention(*widened, SHORT, return_lse=True, backend="reference")[1]
    exact = block_causal_attention(*(x.double() for x in widened), SHORT, return_lse=True, backend="reference")[1]
    assert_accurate(lse, same, exact)


def test_reference_gradients():
    inputs = attention_inputs(1, 2, 14, 3, seed=10, dtype=torch.float64, kv_heads=1, query_length=11)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *x: block_causal_attention(*x, (1, 4, 9), q_offset=2, return_lse=True), leaves
    )


# ---- special values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [155, 60, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_non_finite_values_propagate(cpu, where, value, queries):
    """They propagate as in PyTorch, but a bad key does not reach the rows that do not see it."""
    q, k, v = attention_inputs(1, 2, 155, 24, seed=11, query_length=queries)
    {"q": q, "k": k, "v": v}[where][0, 0, -30 if where != "q" else -2] = value
    results = [block_causal_attention(q, k, v, SHORT, backend="cpu")]
    with stated_order():
        results += [
            block_causal_attention(*(x.to(dtype) for x in (q, k, v)), SHORT, backend="reference")
            for dtype in (torch.float32, torch.float64)
        ]
    assert not results[2].isfinite().all()
    assert_accurate(*results)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_bad_key_does_not_reach_rows_of_its_tile_that_do_not_see_it(cpu, where, dtype):
    # Rows 0 to 4 and key 10 belong to scales that share a tile. 0 times NaN would be NaN.
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 1, 155, 24, seed=11, dtype=dtype))
    clean = block_causal_attention(q, k, v, SHORT, backend="cpu")[:, :, :5]
    (expected,) = torch.autograd.grad(clean.float().sum(), q)
    bad_k, bad_v = (x.detach().clone() for x in (k, v))
    (bad_k if where == "k" else bad_v)[:, :, 10] = torch.nan
    out = block_causal_attention(q, bad_k, bad_v, SHORT, backend="cpu")
    assert torch.equal(out[:, :, :5], clean) and out[:, :, 5:].isnan().all()
    if where == "v":  # dq is a sum of multiples of keys, some of which are 0, as in attention with a mask
        (found,) = torch.autograd.grad(out[:, :, :5].float().sum(), q)
        assert torch.equal(found[:, :, :5], expected[:, :, :5])


@pytest.mark.parametrize("bad_keys", [5, 155])
def test_rows_that_see_only_minus_infinity(cpu, bad_keys):
    """Their output is NaN as in PyTorch. Later rows, which also see finite scores, stay finite."""
    q, k, v = attention_inputs(1, 1, 155, 16, seed=12)
    q[..., 0] = q[..., 0].abs() + 0.1
    k[:, :, :bad_keys, 0] = -float("inf")
    results = [block_causal_attention(q, k, v, SHORT, backend="cpu", return_lse=True)]
    with stated_order():
        results += [
            block_causal_attention(*(x.to(dtype) for x in (q, k, v)), SHORT, backend="reference", return_lse=True)
            for dtype in (torch.float32, torch.float64)
        ]
    for part in zip(*results, strict=True):
        assert_accurate(*part)
    assert results[0][0][0, 0, :5].isnan().all() and results[0][0].isnan().any(-1).sum() == bad_keys


def test_keys_that_no_query_sees_have_zero_gradients(cpu):
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 1, 155, 16, seed=13, query_length=20))
    poison(k)
    block_causal_attention(q, k, v, SHORT, q_offset=0, backend="cpu").sum().backward()
    for grad in (k.grad, v.grad):
        assert (grad[:, :, 30:] == 0).all() and (grad[:, :, :30] != 0).any()


# ---- contract ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 300), (1, 1, 155)])
def test_bit_equal_across_runs_and_thread_counts(cpu, restore_threads, shape):
    batch, heads, length = shape
    lens = (*SHORT, length - 155) if length > 155 else SHORT
    inputs = attention_inputs(batch, heads, length, 40, seed=14)
    dout = randn(batch, heads, length, 40, seed=15)
    first = None
    for threads in (1, 2, 3, 4, 4):
        torch.set_num_threads(threads)
        poison(*inputs)
        results = with_grads(lambda *x: block_causal_attention(*x, lens, backend="cpu"), inputs, dout)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True)), threads


@pytest.mark.parametrize("queries", [1, 4, 5, 8, 9])
def test_few_query_rows_do_not_depend_on_the_number_of_threads(cpu, restore_threads, queries):
    """Whether K was read in place once depended on the split of tiles into tasks, hence on the number of threads."""
    inputs = attention_inputs(2, 4, 155, 24, seed=3, kv_heads=2, query_length=queries)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(block_causal_attention(*inputs, SHORT, backend="cpu", return_lse=True))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_views_of_packed_qkv(cpu, dtype):
    """Views of a fused qkv Linear need no copy, and out has the layout that the following projection needs."""
    packed = randn(2, 155, 3, 4, 40, seed=16, dtype=dtype).requires_grad_()
    dout = randn(2, 4, 155, 40, seed=17, dtype=dtype)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    out = block_causal_attention(q, k, v, SHORT, backend="cpu")
    assert out.transpose(1, 2).is_contiguous()
    (grad,) = torch.autograd.grad(out, packed, dout)
    dense = [x.detach().contiguous() for x in (q, k, v)]
    expected = with_grads(lambda *x: block_causal_attention(*x, SHORT, backend="cpu"), dense, dout)
    assert torch.equal(out, expected[0])
    assert torch.equal(grad.permute(2, 0, 3, 1, 4), torch.stack(expected[1:]))


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x.mT.contiguous().mT, id="strided inner dimension"),
        pytest.param(lambda x: x[:1, :, :1].expand(2, -1, 155, -1), id="expanded"),
        pytest.param(lambda x: F.pad(x, (3, 5))[..., 3:-5], id="unaligned rows"),
        pytest.param(lambda x: x.flip(0)[::1].transpose(0, 1).contiguous().transpose(0, 1), id="batch inside heads"),
    ],
)
def test_strided_inputs(backend, view):
    inputs = attention_inputs(2, 2, 155, 24, seed=18)
    views = [view(x) for x in inputs]
    out = block_causal_attention(*views, SHORT, backend=backend)
    dense = block_causal_attention(*(x.contiguous() for x in views), SHORT, backend=backend)
    if backend == "cpu":
        assert torch.equal(out, dense)
    else:
        torch.testing.assert_close(out, dense)


def test_inputs_are_not_modified(backend):
    inputs = attention_inputs(1, 2, 155, 24, seed=19)
    copies = [x.clone() for x in inputs]
    with_grads(lambda *x: block_causal_attention(*x, SHORT, backend=backend), inputs, randn(1, 2, 155, 24, seed=20))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


@pytest.mark.parametrize(("batch", "queries"), [(0, 5), (2, 0)])
def test_empty(backend, batch, queries):
    q, k, v = (x.requires_grad_() for x in attention_inputs(batch, 2, 5, 8, seed=21, query_length=queries))
    out, lse = block_causal_attention(q, k, v, (1, 4), return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    (out.sum() + lse.sum()).backward()
    assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in (q, k, v))


def test_float64_is_served_by_the_reference():
    q, k, v = attention_inputs(1, 1, 14, 8, seed=22, dtype=torch.float64)
    out, lse = block_causal_attention(q, k, v, (1, 4, 9), return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    with pytest.raises(ValueError, match="does not take torch.float64|not available"):
        block_causal_attention(q, k, v, (1, 4, 9), backend="cpu")


def test_autocast_casts_like_scaled_dot_product_attention(backend):
    q, k, v = attention_inputs(1, 2, 155, 16, seed=23)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_causal_attention(q, k.bfloat16(), v, SHORT, backend=backend)
    assert out.dtype == torch.bfloat16
    halves = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(out, block_causal_attention(*halves, SHORT, backend=backend))


GOOD = {"q": (2, 4, 14, 8), "k": (2, 2, 14, 8), "v": (2, 2, 14, 8), "scale_lens": (1, 4, 9)}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "q: expected 4 dimensions, got shape", {"q": (4, 14, 8)}),
        (TypeError, "k: expected a torch.Tensor, got list", {"k": [1.0]}),
        (TypeError, "v: expected float32.* got torch.int64", {"v": torch.zeros(2, 2, 14, 8, dtype=torch.int64)}),
        (ValueError, "q: expected a head dimension from 1 to 256", {x: (2, 2, 14, 257) for x in "qkv"}),
        (ValueError, "q: expected a head dimension from 1 to 256", {x: (2, 2, 14, 0) for x in "qkv"}),
        (ValueError, "k: expected shape", {"k": (3, 2, 14, 8)}),
        (ValueError, "k: expected shape", {"k": (2, 2, 14, 16)}),
        (ValueError, "k: expected a number of heads that divides q's 4, got 3", {x: (2, 3, 14, 8) for x in "kv"}),
        (ValueError, "k: expected a number of heads that divides q's 4, got 0", {x: (2, 0, 14, 8) for x in "kv"}),
        (ValueError, "v: expected shape", {"v": (2, 2, 13, 8)}),
        (TypeError, "k: expected torch.float32 like q, got torch.bfloat16", {"k": torch.zeros(2, 2, 14, 8).bfloat16()}),
        (ValueError, "v: expected device cpu like q, got meta", {"v": torch.zeros(2, 2, 14, 8, device="meta")}),
        (ValueError, "scale_lens: expected lengths that sum to the 14 keys", {"scale_lens": (1, 4, 8)}),
        (ValueError, "scale_lens: expected one or more lengths > 0", {"scale_lens": (1, 0, 13)}),
        (ValueError, "scale_lens: expected one or more lengths > 0", {"scale_lens": (15, -1)}),
        (ValueError, "scale_lens: expected one or more lengths > 0", {"scale_lens": ()}),
        (TypeError, "scale_lens: expected a sequence of ints", {"scale_lens": (1.0, 13.0)}),
        (TypeError, "scale_lens: expected a sequence of ints", {"scale_lens": 14}),
        (ValueError, "q_offset: expected 0 to Lk - Lq = 14 - 14, got 1", {"q_offset": 1}),
        (ValueError, "q_offset: expected 0 to Lk - Lq = 14 - 14, got -1", {"q_offset": -1}),
        (ValueError, "q_offset: expected 0 to Lk - Lq = 14 - 15", {"q": (2, 4, 15, 8)}),
        (TypeError, "q_offset: expected an int", {"q_offset": 0.0}),
        (ValueError, "backend: expected one of auto", {"backend": "fast"}),
    ],
)
def test_bad_input(error, message, changes):
    arguments = {**GOOD, **changes}
    for name in "qkv":
        if isinstance(arguments[name], tuple):
            arguments[name] = torch.zeros(arguments[name])
    with pytest.raises(error, match=message):
        block_causal_attention(**arguments)


def test_raw_op_checks_what_it_is_given(cpu):
    q, k, v = attention_inputs(1, 2, 14, 8, seed=24)
    with pytest.raises(RuntimeError, match="scale_lens: expected lengths that sum to 14, got 5"):
        RAW._block_causal_attention(q, k, v, [1, 4], 1.0, 0)
    with pytest.raises(RuntimeError, match="q_offset: expected 0 to 0, got 1"):
        RAW._block_causal_attention(q, k, v, [14], 1.0, 1)
    with pytest.raises(RuntimeError, match=r"v: expected shape \(1, 2, 14, 8\), got shape \(1, 2, 13, 8\)"):
        RAW._block_causal_attention(q, k, v[:, :, 1:], [14], 1.0, 0)
    with pytest.raises(RuntimeError, match="k: expected 4 dimensions, got 3"):
        RAW._block_causal_attention(q, k[0], v, [14], 1.0, 0)
    with pytest.raises(RuntimeError, match="v: expected Float, got Half"):
        RAW._block_causal_attention(q, k, v.half(), [14], 1.0, 0)
    out, lse = RAW._block_causal_attention(q, k, v, [14], 1.0, 0)
    for name, wrong in (("dout", (q[:, :1], q, k, v, out, lse)), ("out", (q, q, k, v, out[:, :1], lse)),
                        ("lse", (q, q, k, v, out, lse[..., 1:]))):  # fmt: skip
        with pytest.raises(RuntimeError, match=rf"\b{name}: expected shape .*, got shape"):
            RAW._block_causal_attention_backward(*wrong, None, [14], 1.0, 0)
    with pytest.raises(RuntimeError, match="lse: expected Float, got Double"):
        RAW._block_causal_attention_backward(q, q, k, v, out, lse.double(), None, [14], 1.0, 0)
    with pytest.raises(RuntimeError, match="q: "):
        RAW._block_causal_attention(q.double(), k.double(), v.double(), [14], 1.0, 0)
