"""The Triton kernels of nearest_code, interpreted in fp32 and fp16, and as compiled for sm_80."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

from tests.helpers.triton_launches import recorded
from tests.kernels.nearest_code.contract import (
    assert_as_exact_as_near_the_origin,
    assert_nearest,
    problem_of_tiny_codes,
    problems_of_small_integers,
    problems_with_special_values,
)
from tools.gpu_emulation.triton import executing, interpret, run_ptx
from var_kernels import nearest_code
from var_kernels.testing import poison, randn
from var_kernels.triton import nearest_code as kernels
from var_kernels.triton.configs import Config, override
from var_kernels.triton.offline import compilations, compile_for
from var_kernels.triton.targets import TARGETS

METRICS = ("l2", "cosine")
# Tiles so small that few rows, codes and channels straddle them. There are up to four splits.
SMALL = {
    "nearest_code.prepare": Config({"BLOCK_V": 16, "BLOCK_C": 16}),
    "nearest_code.search": Config({"BLOCK_N": 16, "BLOCK_V": 16, "BLOCK_C": 16}),
    "nearest_code.search_wide": Config({"BLOCK_N": 16, "BLOCK_V": 16, "BLOCK_C": 16}),
    "nearest_code.reduce": Config({"BLOCK_N": 16, "BLOCK_S": 4}),
}


@contextlib.contextmanager
def small_tiles(function=interpret):
    with executing(function), override(SMALL):
        yield


def triton(*arguments, **options) -> torch.Tensor:
    return nearest_code(*arguments, **options, backend="triton")


# ---- numbers ---------------------------------------------------------------------------------------------------------


# Rows, codes and channels below, at and above the tiles and splits, one or several chunks of channels, and 1 of each.
EDGES = [
    (1, 1, 1), (15, 17, 3), (16, 16, 16), (17, 15, 17), (33, 64, 32), (5, 65, 33), (49, 129, 8), (2, 200, 50)
]  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows, codes, channels", EDGES)
def test_small_tiles(rows, codes, channels, metric):
    z, codebook = randn(rows, channels, seed=rows), randn(codes, channels, seed=codes + 7)
    with small_tiles():
        assert_nearest(triton(z, codebook, metric=metric), z, codebook, metric)


# One row has as many splits as the codebook has tiles. 70 rows use tiles of 64 rows, and 2100 rows tiles of 128. 40
# channels are more than a tile has.
@pytest.mark.parametrize("rows, codes, channels", [(1, 1030, 32), (70, 300, 32), (2100, 130, 8), (70, 130, 40)])
def test_shipped_tiles(rows, codes, channels):
    z, codebook = randn(rows, channels, seed=rows), randn(codes, channels, seed=codes + 7)
    with executing(interpret):
        assert_nearest(triton(z, codebook), z, codebook, "l2")


def test_codes_far_from_the_origin():
    with executing(interpret):
        assert_as_exact_as_near_the_origin(triton)
    with small_tiles():
        assert_as_exact_as_near_the_origin(triton)  # several chunks of channels


def test_exact_on_small_integers():
    for z, codebook, first in problems_of_small_integers(((17, 5), (3, 31), (20, 100))):
        with small_tiles():
            assert torch.equal(triton(z, codebook), first), (z.shape, codebook.shape)


@pytest.mark.parametrize("channels", (19, 5))
@pytest.mark.parametrize("metric", METRICS)
def test_first_of_equal_codes(metric, channels):
    # The code at `first` and all later ones are equal: in the same tile, in later tiles, and in later splits.
    target = randn(1, channels, seed=1)
    z = target + randn(3, channels, seed=2, std=0.01)
    far = -target + randn(90, channels, seed=3, std=0.1)
    for first in (0, 1, 15, 16, 40, 63, 64, 89):
        codebook = far.clone()
        codebook[first:] = target
        with small_tiles():
            index = triton(z, codebook, metric=metric)
        assert (index == first).all(), f"expected {first}, got {index.tolist()}"


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_inf_as_in_the_reference(metric):
    for case, (z, codebook) in enumerate(problems_with_special_values(4, 90, 60)):
        with small_tiles():
            index = triton(z, codebook, metric=metric)
        assert torch.equal(index, nearest_code(z, codebook, metric=metric, backend="reference")), case


def test_nan_gives_code_0_and_infinite_codes_are_never_chosen():
    z, codebook = randn(9, 6, seed=1), randn(90, 6, seed=2)
    with small_tiles():
        assert not triton(z, torch.full_like(codebook, torch.nan)).any()
        assert not triton(z * torch.nan, codebook).any()
        codebook[:70, 3] = torch.inf
        assert (triton(z, codebook) >= 70).all()  # codes at an infinite distance have the score -inf


def test_cosine_of_tiny_codes():
    with small_tiles():
        assert triton(*problem_of_tiny_codes(), metric="cosine").item() == 2


@pytest.mark.parametrize("metric", METRICS)
def test_fp16_is_widened_exactly(metric):
    z, codebook = randn(20, 24, seed=1, dtype=torch.float16), randn(70, 24, seed=2, dtype=torch.float16)
    with small_tiles():
        index = triton(z, codebook, metric=metric)
        assert torch.equal(index, triton(z.float(), codebook.float(), metric=metric))


# ---- the code that Triton compiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, codes, channels, dtype, metric",
    [
        (5, 40, 32, torch.float32, "l2"),
        (18, 33, 20, torch.float32, "cosine"),
        (18, 33, 40, torch.bfloat16, "l2"),
        (3, 40, 24, torch.bfloat16, "cosine"),
        (3, 40, 24, torch.float16, "l2"),
    ],
)
def test_compiled(rows, codes, channels, dtype, metric):
    z, codebook = randn(rows, channels, seed=1, dtype=dtype), randn(codes, channels, seed=2, dtype=dtype)
    codebook[codes // 2] = codebook[1]
    z[1] = codebook[1]
    with small_tiles(run_ptx):
        index = triton(z, codebook, metric=metric)
    assert_nearest(index, z, codebook, metric)
    assert index[1] == 1


def test_compiled_with_the_shipped_tiles():
    z, codebook = randn(33, 32, seed=1), randn(70, 32, seed=2)
    z[4, 2] = torch.nan
    codebook[:3] = codebook[60]
    z[7] = codebook[60]
    with executing(run_ptx):
        index = triton(z, codebook)
    assert torch.equal(index, nearest_code(z, codebook, backend="reference"))
    assert index[4] == 0 and index[7] == 0


def test_compiled_products_are_fp32_and_wide():
    launches = recorded(lambda: triton(torch.zeros(8192, 32), torch.zeros(4096, 32)))
    launches += recorded(lambda: triton(torch.zeros(680, 64).bfloat16(), torch.zeros(4096, 64).bfloat16()))
    for launch in launches:
        ptx = compile_for(launch, TARGETS["sm_80"]).asm["ptx"]
        assert "mma.sync" not in ptx and "tf32" not in ptx, launch.name
        if "search" in launch.name:
            assert "fma.rn.f32" in ptx, launch.name
            assert "cp.async.cg.shared.global" in ptx, launch.name  # 16 bytes per thread


# ---- layouts and the call --------------------------------------------------------------------------------------------


def test_strided_inputs():
    z, codebook = randn(4, 9, 7, seed=1), randn(30, 7, seed=2)
    with small_tiles():
        expected = triton(z, codebook)
        assert expected.shape == (4, 9)
        feature_map = z.permute(0, 2, 1).contiguous()  # channels first, as in the output of a convolution
        assert torch.equal(triton(feature_map.permute(0, 2, 1), codebook), expected)
        assert torch.equal(triton(feature_map[1].T, codebook.T.contiguous().T), expected[1])
        wide = torch.cat([codebook, codebook], dim=1)[:, :7]
        assert torch.equal(triton(z[:, ::2], wide), expected[:, ::2])
        assert not triton(z, codebook[:1].expand(40, 7)).any()


def test_empty():
    with small_tiles():
        assert triton(torch.zeros(2, 0, 7), torch.zeros(3, 7)).shape == (2, 0)
        assert torch.equal(triton(torch.zeros(3, 0), torch.zeros(4, 0)), torch.zeros(3).long())


def test_writes_every_element_and_repeats_itself():
    z, codebook = randn(50, 20, seed=1), randn(90, 20, seed=2)
    results = []
    for _ in range(2):
        poison()
        with small_tiles():
            results.append(triton(z, codebook))
    assert torch.equal(*results)
    assert_nearest(results[0], z, codebook, "l2")


def test_opcheck_and_compile():
    z, codebook = randn(3, 5, seed=1), randn(11, 5, seed=2)
    with small_tiles():
        torch.library.opcheck(torch.ops.var_kernels_triton._nearest_code.default, (z, codebook, False))
        torch.library.opcheck(torch.ops.var_kernels_triton._nearest_code.default, (z.half(), codebook.half(), True))
        compiled = torch.compile(lambda z: triton(z, codebook), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(z), triton(z, codebook))


def test_no_recompilation_for_other_numbers_of_rows():
    counted = (kernels.prepare, kernels.search, kernels.reduce)
    numbers = []
    for rows in (1100, 2, 1999, 1024, 33, 1, 2048, 17):
        for launch in recorded(lambda rows=rows: triton(torch.zeros(rows, 32), torch.zeros(4096, 32))):
            compile_for(launch, TARGETS["sm_80"])
        numbers.append([compilations(kernel, TARGETS["sm_80"]) for kernel in counted])
    assert numbers[-1] == numbers[1], "only the first two calls compile, the tiles for many and for few rows"


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_splits_cover_the_codebook_and_fill_the_gpu():
    for row_tiles in (1, 2, 11, 64, 100, 1000):
        for code_tiles in (1, 2, 7, 64, 100, 256):
            for multiprocessors in (82, 132):
                splits, per_split = kernels.count_splits(row_tiles, code_tiles, multiprocessors, 64)
                assert 1 <= splits <= min(64, code_tiles)
                assert (splits - 1) * per_split < code_tiles <= splits * per_split  # no split is empty
    assert kernels.count_splits(1, 64, 132, 64) == (64, 1)
    assert kernels.count_splits(132, 64, 132, 64) == (1, 64)
    assert kernels.count_splits(1000, 64, 132, 64)[0] <= 2


def test_the_search_is_split_where_rows_are_few():
    few = recorded(lambda: triton(torch.zeros(4, 32), torch.zeros(4096, 32)))
    many = recorded(lambda: triton(torch.zeros(128 * 108, 32), torch.zeros(4096, 32)))
    assert [launch.name for launch in few] == [f"nearest_code.{name}" for name in ("prepare", "search", "reduce")]
    assert [launch.name for launch in many] == ["nearest_code.prepare", "nearest_code.search"]
    assert few[1].grid == (1, 64) and many[1].grid == (108, 1)
