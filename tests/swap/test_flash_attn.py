"""Tests the functions that stand for flash-attn: layouts, Infinity's two vectors, packed sequences, the import."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from var_kernels import swap
from var_kernels.swap.flash_attn import flash_attn_func, flash_attn_varlen_kvpacked_func

LENS = [1, 4, 9, 2]


def vectors(lens=LENS, dtype=torch.int32):
    """The two vectors of a schedule: how many keys a query sees, and how many queries don't see a key."""
    starts = [sum(lens[:i]) for i in range(len(lens))]
    repeated = torch.tensor(lens)
    visible = torch.tensor([a + b for a, b in zip(starts, lens, strict=True)], dtype=dtype)
    return visible.repeat_interleave(repeated), torch.tensor(starts, dtype=dtype).repeat_interleave(repeated)


def masked(q, k, v, visible, scale=None):
    """The same in plain PyTorch, for tensors (B, L, H, D)."""
    mask = torch.arange(k.shape[1]) < visible[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def qkv(queries=16, keys=16, heads=4, kv_heads=4):
    torch.manual_seed(0)
    return (
        torch.randn(2, queries, heads, 8, requires_grad=True), *(
            torch.randn(2, keys, kv_heads, 8, requires_grad=True) for _ in range(2)
        )
    )  # fmt: skip


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_two_vectors_of_infinity(kv_heads):
    q, k, v = qkv(kv_heads=kv_heads)
    visible, invisible = vectors()
    out = flash_attn_func(q, k, v, softmax_scale=0.7, VAR_visible_kvlen=visible, VAR_invisible_qlen=invisible)
    expected = masked(q, k, v, visible, scale=0.7)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_infinity_recognises_the_function():
    assert any("Infinity" in name for name in flash_attn_func.__code__.co_varnames)


@pytest.mark.parametrize("queries", [16, 5, 1, 20])
def test_without_a_mask_every_key_is_visible(queries):
    q, k, v = qkv(queries)
    torch.testing.assert_close(
        flash_attn_func(q, k, v), masked(q, k, v, torch.full((queries,), 16)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [16, 20], ids=["block-causal", "full"])
def test_results_are_dense_because_callers_view_them(queries, dtype):
    q, k, v = (x.detach().to(dtype) for x in qkv(queries))
    assert flash_attn_func(q, k, v).view(2, queries, 32).shape == (2, queries, 32)
    heads_first = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert flash_attn_func(*heads_first).view(2, queries, 32).shape == (2, queries, 32)


@pytest.mark.parametrize("queries", [16, 5])
def test_causal_masks_end_at_the_last_key(queries):
    q, k, v = qkv(queries)
    visible = torch.arange(16 - queries, 16) + 1
    torch.testing.assert_close(flash_attn_func(q, k, v, causal=True), masked(q, k, v, visible), rtol=1e-5, atol=1e-5)


def test_vectors_that_contradict_one_another_are_refused():
    q, k, v = qkv()
    visible, invisible = vectors()
    for argument, changed in (
        ("VAR_invisible_qlen", (visible, vectors([4, 1, 9, 2])[1])),
        ("VAR_visible_kvlen", (visible - 1, invisible)),
        ("VAR_visible_kvlen", (visible[:-2], invisible[:-2])),
    ):
        with pytest.raises(ValueError, match=f"{argument}: expected"):
            flash_attn_func(q, k, v, VAR_visible_kvlen=changed[0], VAR_invisible_qlen=changed[1])
    with pytest.raises(TypeError, match="VAR_invisible_qlen: expected a tensor of integers, got NoneType"):
        flash_attn_func(q, k, v, VAR_visible_kvlen=visible)
    with pytest.raises(TypeError, match="VAR_visible_kvlen: expected a tensor of integers, got torch.float32"):
        flash_attn_func(q, k, v, VAR_visible_kvlen=visible.float(), VAR_invisible_qlen=invisible)


def test_vectors_that_are_written_to_are_read_again():
    q, k, v = qkv()
    visible, invisible = vectors()
    flash_attn_func(q, k, v, VAR_visible_kvlen=visible, VAR_invisible_qlen=invisible)
    for vector, changed in zip((visible, invisible), vectors([2, 5, 9]), strict=True):
        vector.copy_(changed)
    out = flash_attn_func(q, k, v, VAR_visible_kvlen=visible, VAR_invisible_qlen=invisible)
    torch.testing.assert_close(out, masked(q, k, v, visible), rtol=1e-5, atol=1e-5)


def test_what_only_flash_attn_has_is_refused_by_name():
    q, k, v = qkv()
    for options in (
        {"window_size": (4, 0)}, {"softcap": 3.0}, {"alibi_slopes": torch.ones(4)}, {"return_attn_probs": True},
        {"causal": True, "dropout_p": 0.1},
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=f"{[*options][-1]}: expected"):
            flash_attn_func(q, k, v, **options)


def packed(lens_q, lens_k):
    torch.manual_seed(0)
    offsets = [
        torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32) for lens in (lens_q, lens_k)
    ]
    q, kv = torch.randn(sum(lens_q), 4, 8, requires_grad=True), torch.randn(sum(lens_k), 2, 4, 8, requires_grad=True)
    return q, kv, *offsets, max(lens_q, default=0), max(lens_k, default=0)


@pytest.mark.parametrize("lens_k", [[3, 5], [1, 7], [4, 0]], ids=str)
def test_packed_sequences(lens_k):
    lens_q = [6, 2]
    arguments = packed(lens_q, lens_k)
    q, kv = arguments[:2]
    out = flash_attn_varlen_kvpacked_func(*arguments, softmax_scale=0.3)
    expected = []
    for rows, (k, v) in zip(q.split(lens_q), ((kv[:, 0], kv[:, 1]) for kv in kv.split(lens_k)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", rows, k) * 0.3
        expected.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(out.sum(), kv)[0].isfinite().all()


def test_packed_lengths_that_do_not_add_up_are_refused():
    q, kv, offsets_q, offsets_k, *longest = packed([6, 2], [3, 5])
    for argument, arguments in (
        ("cu_seqlens_q", (q[1:], kv, offsets_q, offsets_k, *longest)),
        ("cu_seqlens_k", (q, kv, offsets_q, offsets_k.flip(0), *longest)),
        ("cu_seqlens_k", (q, kv, offsets_q, torch.tensor([0, 8]), 6, 8)),
        ("max_seqlen_k", (q, kv, offsets_q, offsets_k, 6, 4)),
        ("kv", (q, kv[:, :1], offsets_q, offsets_k, *longest)),
    ):
        with pytest.raises(ValueError, match=f"^{argument}: expected"):
            flash_attn_varlen_kvpacked_func(*arguments)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_the_import_of_flash_attn_finds_the_functions():
    program = (
        "from var_kernels import swap\n"
        "module = swap.provide_flash_attn()\n"
        "assert swap.provide_flash_attn() is module\n"
        "from flash_attn import flash_attn_func, flash_attn_varlen_kvpacked_func\n"
        "assert flash_attn_func is swap.flash_attn.flash_attn_func\n"
        "import importlib.util\n"
        "importlib.util.find_spec('flash_attn')\n"  # as libraries look for it
        "try:\n"
        "    from flash_attn.ops.layer_norm import dropout_add_layer_norm\n"
        "except ImportError:\n"
        "    print('no more is there')\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout == "no more is there\n", answer.stderr


def test_an_installed_flash_attn_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", type(sys)("flash_attn"))
    with pytest.raises(RuntimeError, match="found an installed one"):
        swap.provide_flash_attn()
