"""qk_norm_cache on the CPU: accuracy against fp64, rows of the caches, layouts, arguments."""

import functools

import pytest
import torch

from tests.kernels.qk_norm_cache.contract import (
    DTYPES,
    assert_right,
    assert_short_vectors_are_normalised,
    expected,
    problem,
    without_dense_rows,
)
from var_kernels import qk_norm_cache

# Head dimensions on both sides of every vector width, 126 and 104 of Infinity among them. Tokens make several tasks.
SHAPES = [(1, 1, 1, 1), (2, 3, 2, 7), (1, 5, 3, 8), (2, 16, 2, 15), (1, 40, 4, 16), (2, 9, 3, 33), (1, 4, 2, 64),
          (3, 70, 16, 64), (1, 2, 1, 104), (2, 5, 2, 126), (1, 300, 4, 128)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype):
    qkv, q_factor, k_cache, v_cache = problem(*shape, dtype)
    q = qk_norm_cache(qkv, k_cache, v_cache, 3, q_factor=q_factor)
    assert_right(q, qkv, q_factor, k_cache, v_cache, start=3)


@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_strided_inputs_and_caches(layout):
    batch, length, heads, dim = 2, 6, 3, 24
    qkv, q_factor, k_cache, v_cache = problem(batch, length, heads, dim, layout=layout)
    want = qk_norm_cache(qkv, k_cache, v_cache, 2, q_factor=q_factor).clone()
    kept = k_cache.clone(), v_cache.clone()
    wide = torch.full((batch, 2 * length, 3, heads + 1, dim + 3), torch.nan)
    strided = wide[:, ::2, :, :heads, :dim]
    strided.copy_(qkv)
    for source in (strided, without_dense_rows(qkv)):
        k_cache.fill_(torch.nan), v_cache.fill_(torch.nan)
        # The reference sums squares in an order that depends on the strides.
        found = qk_norm_cache(source, k_cache, v_cache, 2, q_factor=q_factor)
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)
        for cache, old in zip((k_cache, v_cache), kept, strict=True):
            torch.testing.assert_close(cache, old, rtol=1e-6, atol=0, equal_nan=True)


def test_caches_of_different_layouts():
    qkv, q_factor, k_cache, v_cache = problem(2, 6, 3, 24)
    v_cache = v_cache.transpose(1, 2).contiguous().transpose(1, 2)
    q = qk_norm_cache(qkv, k_cache, v_cache, 2, q_factor=q_factor)
    assert_right(q, qkv, q_factor, k_cache, v_cache, start=2)


def test_default_factor_zeros_and_nan():
    qkv, _, k_cache, v_cache = problem(1, 2, 2, 20)
    qkv[0, 0, 0, 0] = 0
    qkv[0, 1, 1, 1, 3] = torch.nan
    q = qk_norm_cache(qkv, k_cache, v_cache, 0)
    assert not q[0, 0, 0].any(), "a vector of zeros must stay one"
    torch.testing.assert_close(q[0, 1].norm(dim=-1), torch.ones(2))
    assert k_cache[0, 1, 1].isnan().all() and not k_cache[0, 0, :2].isnan().any() and not k_cache[0, 1, 0].isnan().any()


def test_short_vectors(backend):
    assert_short_vectors_are_normalised(functools.partial(qk_norm_cache, backend=backend))


def test_equals_the_reference_in_float64():
    qkv, q_factor, k_cache, v_cache = problem(2, 4, 2, 10, torch.float64)
    q = qk_norm_cache(qkv, k_cache, v_cache, 1, q_factor=q_factor.double())
    exact = expected(qkv, q_factor)
    torch.testing.assert_close(q, exact[0])
    torch.testing.assert_close(k_cache[:, :, 1:5], exact[1])


def test_threads_and_runs_agree(restore_threads):
    qkv, q_factor, k_cache, v_cache = problem(2, 200, 8, 64)
    want = qk_norm_cache(qkv, k_cache, v_cache, 0, q_factor=q_factor), k_cache.clone()
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        assert torch.equal(qk_norm_cache(qkv, k_cache, v_cache, 0, q_factor=q_factor), want[0])
        assert torch.equal(k_cache.nan_to_num(7.0), want[1].nan_to_num(7.0))


def test_nothing_to_do():
    for shape in ((0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)):
        qkv, q_factor, k_cache, v_cache = problem(*shape)
        q = qk_norm_cache(qkv, k_cache, v_cache, 0, q_factor=q_factor)
        assert q.shape == (shape[0], shape[2], shape[1], shape[3])


def test_compile_writes_the_caches():
    qkv, q_factor, k_cache, v_cache = problem(2, 5, 2, 16)
    want = qk_norm_cache(qkv, k_cache, v_cache, 3, q_factor=q_factor), k_cache.clone(), v_cache.clone()

    @torch.compile(fullgraph=True)
    def step(qkv, k_cache, v_cache, q_factor):
        return qk_norm_cache(qkv, k_cache, v_cache, 3, q_factor=q_factor) * 1

    k_cache.fill_(torch.nan), v_cache.fill_(torch.nan)
    with torch.no_grad():
        found = step(qkv, k_cache, v_cache, q_factor)
    # Without the library, torch compiles the reference and changes the order of the sums of squares.
    for one, other in zip((found, k_cache, v_cache), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    from var_kernels.native import load

    if not load.native_library().available:
        pytest.skip("no native library")
    qkv, q_factor, k_cache, v_cache = problem(2, 3, 2, 8, dtype)
    torch.library.opcheck(torch.ops.var_kernels._qk_norm_cache, (qkv, q_factor, k_cache.zero_(), v_cache.zero_(), 1))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"qkv": torch.zeros(2, 3, 2, 4, 8)}, ValueError, "qkv: expected shape"),
        ({"qkv": torch.zeros(2, 3, 3, 32)}, ValueError, "qkv: expected 5 dimensions"),
        ({"qkv": torch.zeros(2, 3, 3, 4, 8).int()}, TypeError, "qkv: expected float32"),
        ({"k_cache": torch.zeros(2, 4, 9, 7)}, ValueError, "k_cache: expected shape"),
        ({"k_cache": torch.zeros(2, 4, 2, 8)}, ValueError, "k_cache: expected at least 3 rows"),
        ({"v_cache": torch.zeros(2, 4, 9, 8).bfloat16()}, TypeError, "v_cache: expected torch.float32"),
        ({"v_cache": torch.zeros(2, 4, 9, 16)[..., ::2]}, ValueError, "v_cache: expected a dense last"),
        ({"start": -1}, ValueError, "start: expected a row in 0 … 6, got -1"),
        ({"start": 7}, ValueError, "start: expected a row in 0 … 6, got 7"),
        ({"start": 1.0}, TypeError, "start: expected an integer"),
        ({"q_factor": torch.zeros(3)}, ValueError, "q_factor: expected shape"),
        ({"q_factor": torch.zeros(4).half()}, TypeError, "q_factor: expected torch.float32"),
        ({"qkv": torch.zeros(2, 3, 3, 4, 8, requires_grad=True)}, RuntimeError, "no gradient"),
        ({"backend": "nonsense"}, ValueError, "backend: expected one of"),
    ],
)  # fmt: skip
def test_bad_input(change, error, match):
    arguments = {
        "qkv": torch.zeros(2, 3, 3, 4, 8), "k_cache": torch.zeros(2, 4, 9, 8), "v_cache": torch.zeros(2, 4, 9, 8),
        "start": 0, "q_factor": torch.ones(4), **change,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        qk_norm_cache(**arguments)
