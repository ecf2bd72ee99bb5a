"""What the tests of every backend of qk_norm_cache share: inputs, the results of plain PyTorch, comparisons."""

import torch
from torch.nn.functional import normalize

from var_kernels import qk_norm_cache
from var_kernels.testing import assert_accurate, randn, stated_order

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(batch, length, heads, dim, dtype=torch.float32, rows=None, layout="BHLD"):
    """qkv, q_factor, and caches filled with NaN that have room around the new rows."""
    rows = length + 5 if rows is None else rows
    qkv = randn(batch, length, 3, heads, dim, seed=length, dtype=dtype)
    shape = (batch, heads, rows, dim) if layout == "BHLD" else (batch, rows, heads, dim)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    if layout == "BLHD":
        caches = [cache.transpose(1, 2) for cache in caches]
    return qkv, randn(heads, seed=dim).exp(), *caches


def expected(qkv, q_factor):
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return normalize(q, dim=-1) * q_factor.to(q.dtype).view(-1, 1, 1), normalize(k, dim=-1), v


def assert_right(q, qkv, q_factor, k_cache, v_cache, start):
    """q and the new rows of k are as accurate as in plain PyTorch, those of v are copies, and no other row is written.

    `k_cache` and `v_cache` are those of `problem`, after the call that returned `q`.
    """
    exact = expected(qkv.double(), q_factor.double())
    with stated_order():
        plain = [tensor.to(qkv.dtype) for tensor in expected(qkv.float(), q_factor)]
    end = start + qkv.shape[1]
    assert_accurate(q, plain[0], exact[0], name="q")
    assert_accurate(k_cache[:, :, start:end], plain[1], exact[1], name="k")
    assert torch.equal(v_cache[:, :, start:end], plain[2])
    for cache in (k_cache, v_cache):
        assert cache[:, :, :start].isnan().all() and cache[:, :, end:].isnan().all()


def assert_zero_and_nan_vectors(op, dim, views):
    """A vector of zeros stays one, and a NaN stays in its vector, for each of `views` of the same values.

    `op` takes the arguments of `qk_norm_cache`; a view is a function that lays out qkv in another way.
    """
    qkv, q_factor, k_cache, v_cache = problem(2, 4, 3, dim)
    qkv[0, 0, 0, 0] = 0
    qkv[0, 1, 1, 1, 3] = torch.nan
    want = [torch.full_like(k_cache, torch.nan) for _ in range(2)]
    expected_q = qk_norm_cache(qkv, *want, 1, q_factor=q_factor, backend="reference")
    for view in views:
        q = op(view(qkv), k_cache, v_cache, 1, q_factor=q_factor)
        torch.testing.assert_close(q, expected_q, equal_nan=True)
        torch.testing.assert_close(k_cache, want[0], equal_nan=True)
        assert not q[0, 0, 0].any()


def assert_short_vectors_are_normalised(op):
    """Vectors become unit vectors down to a length of 1e-12; shorter ones are divided by 1e-12.

    `op` takes the arguments of `qk_norm_cache`. The lengths lie on both sides of 1e-12, and of larger floors.
    """
    lengths = torch.tensor([1e-4, 1e-7, 1e-9, 2e-11, 2e-12, 5e-13, 1e-15])
    qkv = normalize(randn(1, len(lengths), 3, 2, 24, seed=1), dim=-1) * lengths.view(-1, 1, 1, 1)
    k_cache, v_cache = torch.zeros(2, 1, 2, len(lengths), 24)
    q = op(qkv, k_cache, v_cache, 0)
    want = (lengths / 1e-12).clamp(max=1).expand(1, 2, -1)
    torch.testing.assert_close(q.norm(dim=-1), want, rtol=1e-5, atol=0)
    torch.testing.assert_close(k_cache.norm(dim=-1), want, rtol=1e-5, atol=0)


def without_dense_rows(qkv):
    return torch.stack((qkv, qkv), dim=-1)[..., 0]
