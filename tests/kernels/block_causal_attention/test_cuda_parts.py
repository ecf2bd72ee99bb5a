"""The CUDA kernels of attention for few queries, which divide the keys of a tile into parts.

The kinds of tests are those of test_cuda.py. The emulated GPU has 6 multiprocessors.
"""

from dataclasses import dataclass

import pytest
import torch

from tests.kernels.block_causal_attention.contract import references
from tests.kernels.block_causal_attention.emulated import (
    HALVES,
    KERNELS,
    SOURCE,
    TENSOR_CORE_DIMS,
    emulation,
    needs_nvcc,
)
from tools.gpu_emulation.cuda.mutants import Mutant, assert_found, assert_nothing_found, parameters
from var_kernels import block_causal_attention
from var_kernels.testing import assert_accurate, attention_inputs, randn


@dataclass(frozen=True)
class Case:
    """A problem. A head has `tiles` tiles of queries, and the keys of the one that sees most are in `parts` parts."""

    lens: tuple[int, ...]
    queries: int
    tiles: int
    parts: int
    heads: int = 1
    kv_heads: int = 1
    q_offset: int | None = None

    def inputs(self, dtype, *, dim=64, seed=0):
        return attention_inputs(1, self.heads, sum(self.lens), dim, seed=seed, dtype=dtype, kv_heads=self.kv_heads,
                                query_length=self.queries)  # fmt: skip


# If there are fewer than 6 blocks of queries, keys are divided into parts of at least 256, such that there are at most
# 18 blocks with 64 columns, or 12 with more.
CASES = {
    "one token": Case((200, 1000, 70), 1, 1, 4),
    "parts of one block less and more": Case((575, 1), 1, 1, 2, heads=2),
    "a step": Case((64, 1, 500, 80), 80, 2, 2, heads=2, kv_heads=2),
    "as many blocks as fit": Case((2, 1500), 10, 1, 3, heads=5),
    "tiles of one part and of three": Case((30, 900, 3), 70, 2, 3, heads=2, kv_heads=1, q_offset=20),
    "rows that see less than a part": Case((1, 600), 64, 1, 2, heads=2, q_offset=0),
    "rows that see nothing of two parts": Case((1, 300, 900), 30, 1, 4, q_offset=290),
    "every row sees another number of keys": Case((1,) * 600, 40, 1, 2, heads=4, kv_heads=2, q_offset=555),
}
WHOLE = {
    "a block for each multiprocessor": Case((600,), 70, 2, 1, heads=3),
    "few keys": Case((500, 11), 11, 1, 1),
}


def check(case, inputs, variant="fast", **options):
    """out and lse are as accurate as plain PyTorch in the same dtype, from as many parts as expected."""
    with emulation(variant, **options) as record:
        out, lse = block_causal_attention(*inputs, case.lens, q_offset=case.q_offset, backend="cuda", return_lse=True)
    dim = inputs[0].shape[3]
    combining = 0 if case.parts == 1 else -(-64 * (dim // 8) // 128)  # blocks for each tile
    assert record.counters["launches"] == (1 if case.parts == 1 else 2)
    assert record.counters["bank_conflicts"] == 0
    if "executor" not in options:
        assert record.counters["blocks"] == case.tiles * case.heads * (case.parts + combining)
    same, exact = references(inputs, case.lens, q_offset=case.q_offset)
    assert_accurate(out, same[0], exact[0], name="out")
    same, exact = references([x.float() for x in inputs], case.lens, q_offset=case.q_offset)
    assert_accurate(lse, same[1], exact[1], name="lse")


# ---- accuracy, races, bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cases(dtype, variant):
    for index, case in enumerate([*CASES.values(), *WHOLE.values()]):
        inputs = case.inputs(dtype, seed=index)
        check(case, inputs, variant, seed=(0, 1, 7)[index % 3], late_copies=index % 2 == 0)


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_head_dims(dtype, variant):
    case = Case((3, 700, 90), 90, 2, 3, heads=2, kv_heads=1)
    for index, dim in enumerate(TENSOR_CORE_DIMS):
        check(case, case.inputs(dtype, dim=dim, seed=dim), variant, seed=index, late_copies=index % 2 == 1)


def test_views_of_packed_qkv():
    case = CASES["a step"]
    packed = randn(1, sum(case.lens), 3, 2, 24, seed=18, dtype=torch.bfloat16)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    check(case, (q[:, :, -80:], k, v), "race")


def test_every_order_gives_the_same_bits():
    case = CASES["rows that see nothing of two parts"]
    inputs, results = case.inputs(torch.bfloat16), []
    for seed in (0, 1, 2, 9):
        for late_copies in (True, False):
            with emulation(seed=seed, late_copies=late_copies):
                results.append(block_causal_attention(*inputs, case.lens, q_offset=case.q_offset, backend="cuda",
                                                      return_lse=True))  # fmt: skip
    assert all(torch.equal(x, y) for result in results[1:] for x, y in zip(result, results[0], strict=True))


def test_sanitizers_find_nothing():
    KERNELS.assert_sanitizers_find_nothing("""
        from tests.kernels.block_causal_attention import test_cuda_parts as tests
        for name, dim in (("tiles of one part and of three", 64), ("one token", 72)):
            case = tests.CASES[name]
            tests.check(case, case.inputs(torch.bfloat16, dim=dim), "sanitized")
    """)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("keys", [slice(700, 701), slice(0, 256), slice(None)], ids=["one", "a part", "all"])
def test_nan_and_inf_as_in_plain_pytorch(keys, bad):
    """The values are in keys, where -inf hides a key, or in values."""
    case = CASES["one token"]
    q, k, v = case.inputs(torch.float16)
    for tensor in (k, v):
        spoiled = tensor.clone()
        spoiled[:, :, keys] = bad
        inputs = (q.abs(), spoiled, v) if tensor is k else (q, k, spoiled)
        with emulation():
            results = block_causal_attention(*inputs, case.lens, backend="cuda", return_lse=True)
        for name, *each in zip(("out", "lse"), results, *references(inputs, case.lens), strict=True):
            assert_accurate(each[0], each[1].to(each[0].dtype), each[2], name=name)


@needs_nvcc
@pytest.mark.parametrize(
    ("name", "dim", "dtype"), [("tiles of one part and of three", 64, torch.bfloat16), ("one token", 72, torch.float16)]
)
def test_ptx_is_accurate(name, dim, dtype):
    from tools.gpu_emulation.cuda.ptx import execute_ptx_of

    check(CASES[name], CASES[name].inputs(dtype, dim=dim), executor=execute_ptx_of(SOURCE))


# ---- planted faults ------------------------------------------------------------------------------------------------

PARTS = "block_causal_attention_parts.cuh"
FAULTS = {
    "parts are not rescaled": Mutant(
        PARTS, "exp2_approx(from.statistics[at].x - shift)", "exp2_approx(0.0f)", "values"),
    "parts have a block between them": Mutant(
        PARTS, "begin = blocks * part / parts", "begin = blocks * part / parts + (part > 0)", "values"),
    "a part goes on to the end": Mutant(PARTS, "min(end * kForwardKeys, tile.limit)", "tile.limit", "values"),
    "neighbours exchange the wrong row": Mutant(
        "block_causal_attention_device.cuh", "odd ? acc[n][0] : acc[n][2]", "odd ? acc[n][2] : acc[n][0]", "values"),
    "parts of all blocks in one place": Mutant(
        PARTS, "to.sums + part_row(a.problem, place, part, 0)", "to.sums + part_row(a.problem, place, 0, 0)",
        "cross_block_race"),
    "parts that do not exist are added": Mutant(
        PARTS, "parts = parts_of(place.tile.limit, from.most)", "parts = from.most", "undefined", representative=True),
    "q lies where values arrive": Mutant(
        "block_causal_attention.cuh", "stages.value_tile(begin + 1)", "stages.value_tile(1)", "in_flight"),
}  # fmt: skip


def steps(faulty, looked_for):
    case = CASES["tiles of one part and of three"]
    yield lambda: check(case, case.inputs(torch.bfloat16), faulty, seed=1)


@pytest.mark.parametrize("name", parameters(FAULTS, others=pytest.mark.evidence))
def test_planted_faults_are_found(name, selected):
    assert_found(SOURCE, FAULTS, name, steps, selected("name"), ("bf16",))


@pytest.mark.evidence
def test_nothing_is_found_without_a_fault():
    assert_nothing_found(SOURCE, FAULTS, steps)
