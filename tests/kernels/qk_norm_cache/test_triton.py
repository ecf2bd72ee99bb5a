"""The Triton kernel of qk_norm_cache, interpreted in fp32 and fp16, and as compiled for sm_80."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from tests.helpers.triton_launches import recorded
from tests.kernels.qk_norm_cache.contract import (
    assert_right,
    assert_short_vectors_are_normalised,
    assert_zero_and_nan_vectors,
    problem,
    without_dense_rows,
)
from tools.gpu_emulation.triton import executing, interpret, run_ptx
from var_kernels import qk_norm_cache
from var_kernels.triton import qk_norm_cache as kernels
from var_kernels.triton.offline import compilations, compile_for
from var_kernels.triton.targets import TARGETS

# Heads and dimensions on both sides of those of a program, so that every kind of mask occurs.
SHAPES = [(1, 1, 1, 1), (2, 3, 3, 7), (1, 5, 2, 64), (2, 2, 17, 40), (1, 2, 3, 126)]


def check(function, shape, dtype, layout="BHLD"):
    qkv, q_factor, k_cache, v_cache = problem(*shape, dtype, layout=layout)
    with executing(function):
        q = qk_norm_cache(qkv, k_cache, v_cache, 3, q_factor=q_factor, backend="triton")
    assert_right(q, qkv, q_factor, k_cache, v_cache, start=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted(shape, dtype):
    check(interpret, shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiled(dtype):
    for shape in (SHAPES[1], SHAPES[2], SHAPES[4]):
        check(run_ptx, shape, dtype, layout="BLHD")


def test_short_vectors():
    with executing(interpret):
        assert_short_vectors_are_normalised(functools.partial(qk_norm_cache, backend="triton"))


def test_strides_zeros_and_nan():
    with executing(interpret):
        triton = functools.partial(qk_norm_cache, backend="triton")
        assert_zero_and_nan_vectors(triton, 20, (torch.clone, without_dense_rows))


def test_no_recompilation_from_step_to_step():
    """The same code serves other scales, batches and positions in the cache."""
    numbers = []
    for batch, length, start in ((2, 1, 0), (2, 4, 1), (4, 256, 424), (1, 9, 5), (3, 1, 0)):
        qkv, _, k_cache, v_cache = problem(batch, length, 16, 64, rows=680)
        launches = recorded(functools.partial(qk_norm_cache, qkv, k_cache, v_cache, start, backend="triton"))
        compile_for(launches[0], TARGETS["sm_80"])
        numbers.append(compilations(kernels.qk_norm_cache_rows, TARGETS["sm_80"]))
    assert numbers[-1] == numbers[0]


def test_loads_and_stores_are_16_bytes_wide():
    qkv, _, k_cache, v_cache = problem(2, 16, 16, 64, torch.bfloat16, rows=680)
    launches = recorded(lambda: qk_norm_cache(qkv, k_cache, v_cache, 0, backend="triton"))
    ptx = compile_for(launches[0], TARGETS["sm_80"]).asm["ptx"]
    assert ptx.count("ld.global.v4") == 3 and ptx.count("st.global.v4") == 3
