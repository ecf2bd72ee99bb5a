"""The CUDA kernels of qk_norm_cache: emulated, compiled, with planted faults (on a CPU)."""

import functools

import pytest
import torch

from tests.helpers.cuda_emulation import EmulatedKernels
from tests.kernels.qk_norm_cache.contract import (
    DTYPES,
    assert_right,
    assert_short_vectors_are_normalised,
    assert_zero_and_nan_vectors,
    problem,
    without_dense_rows,
)
from tools.gpu_emulation.cuda import build, nvcc
from tools.gpu_emulation.cuda.mutants import Mutant, assert_found, assert_nothing_found, parameters
from tools.report import machine_code
from var_kernels import qk_norm_cache
from var_kernels.native import build as native_build
from var_kernels.testing import randn

if build.unavailable_reason() is not None:
    pytest.skip(build.unavailable_reason(), allow_module_level=True)

SOURCE = native_build.CSRC / "cuda" / "qk_norm_cache.cu"
KERNELS = EmulatedKernels(SOURCE)
emulated, emulation = KERNELS.load, KERNELS.serving
# Batch, tokens, heads, head dimension. A head takes 1 to 32 lanes, a lane one or two packs; no pack fits some of them.
EDGES = [(1, 1, 1, 1), (2, 3, 2, 7), (1, 5, 3, 8), (2, 3, 3, 24), (1, 9, 2, 64), (1, 3, 2, 126), (2, 2, 3, 128),
         (1, 2, 1, 256)]  # fmt: skip


def check(shape, dtype, variant="fast", layout="BHLD", **options):
    qkv, q_factor, k_cache, v_cache = problem(*shape, dtype, layout=layout)
    with emulation(variant, **options):
        q = qk_norm_cache(qkv, k_cache, v_cache, 2, q_factor=q_factor, backend="cuda")
    assert_right(q, qkv, q_factor, k_cache, v_cache, start=2)


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, variant):
    for index, shape in enumerate(EDGES):
        check(shape, dtype, variant, layout=("BHLD", "BLHD")[index % 2], seed=index)


def test_short_vectors():
    with emulation():
        assert_short_vectors_are_normalised(functools.partial(qk_norm_cache, backend="cuda"))


def test_strides_alignment_zeros_and_nan():
    def emulated_op(*arguments, **options):
        with emulation("race"):
            return qk_norm_cache(*arguments, **options, backend="cuda")

    def unaligned(qkv):
        wide = torch.zeros(2, 4, 3, 4, 29)
        wide[..., :3, 1:25] = qkv
        return wide[..., :3, 1:25]

    assert_zero_and_nan_vectors(emulated_op, 24, (torch.clone, unaligned, without_dense_rows))


def unfit_for_packs() -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Cases (qkv, k_cache, v_cache), each refused by one check of `packs_fit` only. A pack is 4 elements."""
    shape = {"qkv": (2, 4, 3, 3, 24), "cache": (2, 3, 9, 24)}

    def strided(kind: str, dim: int) -> torch.Tensor:
        """An aligned tensor with an odd stride in the dimension `dim` only."""
        sizes, stride, strides = shape[kind], 24, {}
        for other in sorted(range(len(sizes) - 1), key=lambda d: (d == dim, -d)):  # `dim` is outermost in memory
            strides[other] = stride + (other == dim)
            stride *= sizes[other]
        memory = torch.zeros(sum((size - 1) * strides.get(d, 1) for d, size in enumerate(sizes)) + 1)
        return memory.as_strided(sizes, [*(strides[d] for d in range(len(sizes) - 1)), 1])

    def fit(kind: str) -> torch.Tensor:
        return torch.zeros(shape[kind])

    def shifted(kind: str) -> torch.Tensor:
        return torch.zeros(fit(kind).numel() + 1)[1:].view(shape[kind])

    cases = {f"qkv, stride {dim}": (strided("qkv", dim), fit("cache"), fit("cache")) for dim in range(4)}
    cases["qkv, address"] = (shifted("qkv"), fit("cache"), fit("cache"))
    faults = {f"stride {dim}": functools.partial(strided, dim=dim) for dim in range(3)} | {"address": shifted}
    for what, make in faults.items():
        cases[f"k, {what}"] = (fit("qkv"), make("cache"), fit("cache"))
        cases[f"v, {what}"] = (fit("qkv"), fit("cache"), make("cache"))
    return cases


def check_unfit(variant, names=None) -> None:
    for name, (qkv, k_cache, v_cache) in unfit_for_packs().items():
        if names is not None and name not in names:
            continue
        qkv.copy_(randn(*qkv.shape, seed=1))
        q_factor = torch.tensor([1.0, 2.0, 0.5])
        want = [torch.zeros(k_cache.shape) for _ in range(2)]
        expected_q = qk_norm_cache(qkv, *want, 1, q_factor=q_factor, backend="reference")
        with emulation(variant):
            q = qk_norm_cache(qkv, k_cache, v_cache, 1, q_factor=q_factor, backend="cuda")
        for found, exact in zip((q, k_cache, v_cache), (expected_q, *want), strict=True):
            torch.testing.assert_close(found, exact)


def test_layouts_that_no_pack_fits():
    check_unfit("fast")


def test_empty_and_bad_arguments_of_the_raw_op():
    op = emulated("fast").ops._qk_norm_cache
    factor, cache = torch.ones(3), torch.zeros(2, 3, 9, 8)
    with emulation("fast"):
        assert op(torch.zeros(2, 0, 3, 3, 8), factor, cache, cache.clone(), 0).shape == (2, 0, 3, 8)
    qkv = torch.zeros(2, 4, 3, 3, 8)
    for message, arguments in {
        "qkv: expected shape": (qkv[:, :, :2], factor, cache, cache, 0),
        "qkv: expected float32, bfloat16 or float16, got Double": (qkv.double(), factor, cache, cache, 0),
        "v_cache: expected Float, got Half": (qkv, factor, cache, cache.half(), 0),
        "k_cache: expected shape": (qkv, factor, cache[:, :2], cache, 0),
        "start: expected rows that the caches have, got 6": (qkv, factor, cache, cache, 6),
        "q_factor: expected a dense float32 vector": (qkv, factor[:2], cache, cache, 0),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_sanitizers_find_nothing():
    KERNELS.assert_sanitizers_find_nothing("""
        from tests.kernels.qk_norm_cache import test_cuda as tests
        for shape in tests.EDGES[1:6]:
            tests.check(shape, torch.bfloat16, "sanitized", seed=1)
    """)


@pytest.mark.skipif(nvcc.unavailable_reason() is not None, reason=str(nvcc.unavailable_reason()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ptx_is_accurate(dtype):
    """Executes the code that nvcc compiles for sm_80 in the PTX interpreter, called from the same entry function."""
    from tools.gpu_emulation.cuda.ptx import execute_ptx_of

    for shape in ((1, 3, 2, 64), (2, 2, 3, 7), (1, 2, 1, 256)):
        check(shape, dtype, executor=execute_ptx_of(SOURCE))


REGISTERS = {"qk_norm_cache_kernel": 64, "plain_qk_norm_cache_kernel": 56}


@pytest.mark.evidence
@pytest.mark.parametrize("arch", machine_code.ARCHS)
def test_machine_code(arch, selected):
    kernels = machine_code.kernels(SOURCE, arch, selected("arch"))
    assert len(kernels) == 3 * (2 + 1)  # for each dtype, one or two packs, or single elements
    for kernel in kernels:
        machine_code.assert_resources(kernel, REGISTERS)
        if kernel.name.startswith("qk_norm_cache_kernel"):
            assert len(kernel.having("LDG")) - len(kernel.narrow("LDG")) >= 3, kernel.name
            assert not kernel.narrow("STG"), kernel.name


CODE = "qk_norm_cache.cuh"
MUTANTS = {
    "heads past the end": Mutant(CODE, "const bool present = wanted < a.batch * a.length * a.heads;",
                                 "const bool present = true;", "out_of_bounds", representative=True),
    "packs past the end": Mutant(CODE, "present && at < packs ? ptx", "present ? ptx", "values"),
    "lanes of the next head": Mutant(CODE, "distance = lanes / 2", "distance = lanes", "values"),
    "keys are scaled as queries": Mutant(CODE, "part == 0 ? factor : 1.0f", "factor", "values"),
    "a row too far": Mutant(CODE, "(a.start + token) * cache", "(a.start + 1 + token) * cache", "values"),
}  # fmt: skip


# Without a check of `packs_fit`, kernels make accesses of 16 bytes at addresses that are not aligned.
DOOR = "qk_norm_cache.cu"
UNCHECKED = {
    "qkv, address": Mutant(DOOR, "aligned(a.qkv) && ", "", "misaligned", representative=True),
    **{f"qkv, stride {dim}": Mutant(DOOR, "{a.qkv_sample, a.qkv_token, a.qkv_part, a.qkv_head}",
                                    "{" + ", ".join(f"a.qkv_{part}" for part in parts) + "}", "misaligned")
       for dim, parts in enumerate((("token", "part", "head"), ("sample", "part", "head"), ("sample", "token", "head"),
                                    ("sample", "token", "part")))},
    "k, address": Mutant(DOOR, "fit &= aligned(cache->data) && cache", "fit &= cache", "misaligned"),
    "k, stride 0": Mutant(DOOR, "cache->per_sample % width == 0 && ", "", "misaligned"),
    "k, stride 1": Mutant(DOOR, "cache->per_head % width == 0 &&\n           ", "", "misaligned"),
    "k, stride 2": Mutant(DOOR, "cache->per_head % width == 0 &&\n           cache->per_token % width == 0",
                          "cache->per_head % width == 0", "misaligned"),
    "v, address": Mutant(DOOR, "{&a.k, &a.v}", "{&a.k}", "misaligned"),
}  # fmt: skip


@pytest.mark.parametrize("name", parameters(UNCHECKED, others=pytest.mark.evidence))
def test_every_check_of_the_layout_is_needed(name, selected):
    def look(faulty, looked_for):
        yield lambda: check_unfit(faulty, {name})

    assert_found(SOURCE, UNCHECKED, name, look, selected("name"), ("float",))


def steps(faulty, looked_for):
    yield lambda: check((1, 3, 3, 24), torch.float32, faulty, seed=1)


@pytest.mark.parametrize("name", parameters(MUTANTS, others=pytest.mark.evidence))
def test_planted_faults_are_found(name, selected):
    assert_found(SOURCE, MUTANTS, name, steps, selected("name"), ("float",))


@pytest.mark.evidence
def test_nothing_is_found_without_a_fault():
    assert_nothing_found(SOURCE, MUTANTS, steps)
