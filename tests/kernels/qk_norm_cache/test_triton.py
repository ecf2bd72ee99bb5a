"""The Triton kernel of qk_norm_cache: interpreted in fp32 and fp16, and as compiled for compute capability 8.0."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.qk_norm_cache.contract import expected, problem
from tools.gpu_emulation.triton import executing, interpret, run_ptx
from var_kernels import qk_norm_cache
from var_kernels.testing import assert_accurate, stated_order
from var_kernels.triton import qk_norm_cache as kernels
from var_kernels.triton.launch import executor
from var_kernels.triton.offline import compilations, compile_for
from var_kernels.triton.targets import TARGETS, assume

# Heads and dimensions on both sides of a program's; one of each kind of mask.
SHAPES = [(1, 1, 1, 1), (2, 3, 3, 7), (1, 5, 2, 64), (2, 2, 17, 40), (1, 2, 3, 126)]


def assert_right(function, shape, dtype, layout="BHLD"):
    qkv, q_factor, k_cache, v_cache = problem(*shape, dtype, layout=layout)
    start, length = 3, shape[1]
    with executing(function):
        q = qk_norm_cache(qkv, k_cache, v_cache, start, q_factor=q_factor, backend="triton")
    exact = expected(qkv.double(), q_factor.double())
    with stated_order():
        plain = [tensor.to(dtype) for tensor in expected(qkv.float(), q_factor)]
    rows = slice(start, start + length)
    assert_accurate(q, plain[0], exact[0], name="q")
    assert_accurate(k_cache[:, :, rows], plain[1], exact[1], name="k")
    assert torch.equal(v_cache[:, :, rows], plain[2])
    for cache in (k_cache, v_cache):
        assert cache[:, :, :start].isnan().all() and cache[:, :, start + length :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape, dtype):
    assert_right(interpret, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled(dtype):
    for shape in (SHAPES[1], SHAPES[2], SHAPES[4]):
        assert_right(run_ptx, shape, dtype, layout="BLHD")


def test_strides_zeros_and_nan():
    qkv, q_factor, k_cache, v_cache = problem(2, 4, 3, 20)
    qkv[0, 0, 0, 0] = 0
    qkv[0, 1, 1, 1, 3] = torch.nan
    want = [torch.full_like(k_cache, torch.nan) for _ in range(2)]
    expected_q = qk_norm_cache(qkv, *want, 1, q_factor=q_factor, backend="reference")
    no_dense_row = torch.stack((qkv, qkv), dim=-1)[..., 0]
    for source in (qkv, no_dense_row):
        with executing(interpret):
            q = qk_norm_cache(source, k_cache, v_cache, 1, q_factor=q_factor, backend="triton")
        torch.testing.assert_close(q, expected_q, equal_nan=True)
        torch.testing.assert_close(k_cache, want[0], equal_nan=True)
        assert not q[0, 0, 0].any()


def test_no_recompilation_from_step_to_step():
    """Another scale, another batch, another place in the cache: the same code."""
    numbers = []
    for batch, length, start in ((2, 1, 0), (2, 4, 1), (4, 256, 424), (1, 9, 5), (3, 1, 0)):
        launches = []
        qkv, _, k_cache, v_cache = problem(batch, length, 16, 64, rows=680)
        with assume(TARGETS["sm_80"]), executor(launches.append):
            qk_norm_cache(qkv, k_cache, v_cache, start, backend="triton")
        compile_for(launches[0], TARGETS["sm_80"])
        numbers.append(compilations(kernels.qk_norm_cache_rows, TARGETS["sm_80"]))
    assert numbers[-1] == numbers[0]


def test_loads_and_stores_are_16_bytes_wide():
    launches = []
    qkv, _, k_cache, v_cache = problem(2, 16, 16, 64, torch.bfloat16, rows=680)
    with assume(TARGETS["sm_80"]), executor(launches.append):
        qk_norm_cache(qkv, k_cache, v_cache, 0, backend="triton")
    ptx = compile_for(launches[0], TARGETS["sm_80"]).asm["ptx"]
    assert ptx.count("ld.global.v4") == 3 and ptx.count("st.global.v4") == 3
