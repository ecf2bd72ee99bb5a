"""The CUDA kernels of nearest_code: emulated, compiled, with planted faults (on a CPU)."""


import pytest
import torch

from tests.helpers.cuda_emulation import EmulatedKernels
from tests.kernels.nearest_code.contract import (
    assert_as_exact_as_near_the_origin,
    assert_nearest,
    problem_far_from_the_origin,
    problem_of_tiny_codes,
    problems_of_small_integers,
    problems_with_special_values,
)
from tools.gpu_emulation.cuda import build, nvcc
from tools.gpu_emulation.cuda.mutants import Mutant, assert_found, assert_nothing_found, parameters
from tools.report import machine_code
from var_kernels import nearest_code
from var_kernels.native import build as native_build
from var_kernels.testing import randn

if build.unavailable_reason() is not None:
    pytest.skip(build.unavailable_reason(), allow_module_level=True)

SOURCE = native_build.CSRC / "cuda" / "nearest_code.cu"
KERNELS = EmulatedKernels(SOURCE)
emulated, emulation = KERNELS.load, KERNELS.serving
METRICS = ("l2", "cosine")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows, codes, channels. A block takes 8, 16, 32 or 64 rows by 128 codes by 32 channels. The problems are on both sides
# of these numbers, aligned or not, with one or several chunks of channels. Some have one tile of codes, others as many
# splits as the emulated GPU has room for.
EDGES = [
    (1, 1, 1), (8, 127, 3), (9, 128, 32), (16, 129, 31), (17, 257, 36), (32, 90, 64), (33, 1030, 32), (64, 300, 8),
    (65, 140, 33), (3, 700, 100), (130, 65, 4),
]  # fmt: skip


def search(z, codebook, metric="l2", variant="fast", **options):
    with emulation(variant, **options):
        return nearest_code(z, codebook, metric=metric, backend="cuda")


# ---- exactness, races, bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_nearest_within_rounding(metric, dtype, variant):
    for index, (rows, codes, channels) in enumerate(EDGES):
        z, codebook = randn(rows, channels, seed=rows, dtype=dtype), randn(codes, channels, seed=codes + 7, dtype=dtype)
        found = search(z, codebook, metric, variant, seed=(0, 1, 7)[index % 3], late_copies=index % 2 == 0)
        assert_nearest(found, z, codebook, metric)


def test_few_rows_are_searched_in_splits():
    z, codebook = randn(5, 32, seed=1), randn(1030, 32, seed=2)
    with emulation() as record:
        found = nearest_code(z, codebook, backend="cuda")
        assert torch.equal(nearest_code(z.repeat(60, 1), codebook, backend="cuda"), found.repeat(60))
    # The centre, then a search with its candidates. The many rows keep the emulated GPU busy without splits.
    assert record.counters["launches"] == 3 + 2


def test_codes_far_from_the_origin():
    assert_as_exact_as_near_the_origin(search)


@pytest.mark.parametrize("variant", ["fast", "race"])
def test_exact_on_small_integers(variant):
    for z, codebook, first in problems_of_small_integers(((17, 5), (3, 31), (70, 500), (2, 900))):
        assert torch.equal(search(z, codebook, variant=variant, seed=1), first), (z.shape, codebook.shape)


@pytest.mark.parametrize("channels", [19, 40])
@pytest.mark.parametrize("metric", METRICS)
def test_first_of_equal_codes(metric, channels):
    # The code at `first` and all later ones are equal, in other lanes, warps, tiles and splits.
    target = randn(1, channels, seed=1)
    far = -target + randn(700, channels, seed=3, std=0.1)
    for rows in (3, 40):
        z = target + randn(rows, channels, seed=2, std=0.01)
        for first in (0, 1, 7, 8, 63, 64, 127, 128, 300, 699):
            codebook = far.clone()
            codebook[first:] = target
            found = search(z, codebook, metric, seed=first)
            assert (found == first).all(), f"expected {first}, got {found.tolist()}"


def test_a_row_does_not_depend_on_its_neighbours():
    # The calls differ in rows per thread and in splits. Scores have the same bits, so that even near-ties agree.
    z, codebook = randn(200, 24, seed=1, std=1e-3) + 3, randn(1000, 24, seed=2, std=1e-3) + 3
    everything = search(z, codebook)
    for count in (1, 9, 20, 40, 150):
        assert torch.equal(search(z[:count], codebook, seed=count), everything[:count])


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_inf_as_in_the_reference(metric):
    for z, codebook in problems_with_special_values(6, 190, 60):
        assert torch.equal(search(z, codebook, metric), nearest_code(z, codebook, metric=metric, backend="reference"))


def test_nan_gives_code_0_and_infinite_codes_are_never_chosen():
    z, codebook = randn(9, 6, seed=1), randn(190, 6, seed=2)
    assert not search(z, torch.full_like(codebook, torch.nan)).any()
    assert not search(z * torch.nan, codebook).any()
    codebook[:170, 3] = torch.inf
    assert (search(z, codebook) >= 170).all()  # codes at an infinite distance have the score -inf


def test_cosine_of_tiny_codes():
    assert search(*problem_of_tiny_codes(), "cosine").item() == 2


def test_sanitizers_find_nothing():
    KERNELS.assert_sanitizers_find_nothing("""
        from tests.kernels.nearest_code import test_cuda as tests
        for rows, codes, channels in tests.EDGES:
            for dtype in tests.DTYPES[:2]:
                z, codebook = (tests.randn(n, channels, seed=n, dtype=dtype) for n in (rows, codes))
                tests.assert_nearest(tests.search(z, codebook, "cosine", "sanitized", seed=1), z, codebook, "cosine")
    """)


# ---- layouts, the call ---------------------------------------------------------------------------------------------


def test_strided_inputs():
    z, codebook = randn(40, 12, seed=1), randn(300, 12, seed=2)
    expected = search(z, codebook)
    layouts = (
        lambda x: x.T.contiguous().T,  # copied
        lambda x: torch.nn.functional.pad(x, (4, 4))[:, 4:-4],  # aligned pieces
        lambda x: torch.nn.functional.pad(x, (1, 2))[:, 1:-2],  # rows at odd addresses
        lambda x: x.repeat_interleave(2, 0)[::2],
    )
    for first, layout in enumerate(layouts):
        other = layouts[(first + 1) % len(layouts)]
        assert torch.equal(search(layout(z), other(codebook), variant="race"), expected)


@pytest.mark.parametrize("rows, codes, channels", [(0, 5, 4), (3, 5, 0)])
def test_empty_raw_op(rows, codes, channels):
    with emulation("race"):
        found = emulated("race").ops._nearest_code(torch.zeros(rows, channels), torch.zeros(codes, channels), False)
    assert torch.equal(found, torch.zeros(rows).long())


def test_raw_op_checks_its_arguments():
    op = emulated("fast").ops._nearest_code
    for message, arguments in {
        "z: expected 2 dimensions, got 1": (torch.zeros(7), torch.zeros(9, 7)),
        "codebook: expected 7, got 6 channels": (torch.zeros(5, 7), torch.zeros(9, 6)),
        "codebook: expected at least one code, got 0": (torch.zeros(5, 7), torch.zeros(0, 7)),
        "z: expected float32, bfloat16 or float16, got Double": torch.zeros(2, 5, 7).double().unbind(),
        "codebook: expected Float, got Half": (torch.zeros(5, 7), torch.zeros(9, 7).half()),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, False)


def test_opcheck():
    with emulation():
        for cosine in (False, True):
            arguments = (randn(5, 8, seed=1), randn(11, 8, seed=2), cosine)
            torch.library.opcheck(emulated("fast").ops._nearest_code.default, arguments)


# ---- the code that nvcc compiles -----------------------------------------------------------------------------------


@pytest.mark.skipif(nvcc.unavailable_reason() is not None, reason=str(nvcc.unavailable_reason()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_ptx_is_accurate(metric, dtype):
    """Executes the code that nvcc compiles for sm_80 in the PTX interpreter, called from the same entry function."""
    from tools.gpu_emulation.cuda.ptx import execute_ptx_of

    for rows, codes, channels in ((3, 300, 32), (9, 130, 33), (20, 131, 8), (70, 129, 36)):
        z, codebook = randn(rows, channels, seed=rows, dtype=dtype), randn(codes, channels, seed=codes, dtype=dtype)
        assert_nearest(search(z, codebook, metric, executor=execute_ptx_of(SOURCE)), z, codebook, metric)


# Three blocks of 128 threads fit on a multiprocessor.
REGISTERS = {
    "nearest_code_kernel": 168, "normalise_codes_kernel": 40, "best_candidate_kernel": 40, "centre_kernel": 64
}  # fmt: skip


@pytest.mark.evidence
@pytest.mark.parametrize("arch", machine_code.ARCHS)
def test_machine_code(arch, selected):
    kernels = machine_code.kernels(SOURCE, arch, selected("arch"))
    # The search, by rows of a thread and width of loads; centre and norms, by dtype; candidates.
    assert len(kernels) == 4 * 2 + 3 + 3 + 1
    for kernel in kernels:
        machine_code.assert_resources(kernel, REGISTERS)
        if kernel.name.startswith("nearest_code_kernel<true"):
            assert kernel.having("LDGSTS") and not kernel.narrow("LDGSTS") and not kernel.having("LDG"), kernel.name
            # Operands of 8 codes and of the thread's rows are loaded in 16 bytes. No product is rounded to fewer bits.
            wide = len(kernel.having("LDS")) - len(kernel.narrow("LDS"))
            assert wide >= 8 + int(kernel.name[-2]) and not kernel.having("HMMA"), f"{kernel.name}: {wide} wide loads"


# ---- planted faults ------------------------------------------------------------------------------------------------

SEARCH = "nearest_code_search.cuh"
MUTANTS = {
    "does not wait for the copies": Mutant(SEARCH, "ptx::cp_async_wait<0>();", "ptx::cp_async_wait<1>();", "in_flight"),
    "no barrier after the wait": Mutant(
        SEARCH, "__syncthreads();  // this step's tile has landed,", "//", "race", representative=True),
    "no barrier before the scores": Mutant(
        SEARCH, "code + thread < end);\n    __syncthreads();", "code + thread < end);", "race"),
    "no barrier before the winners": Mutant(
        SEARCH, "  __syncthreads();\n  Candidate winner", "  Candidate winner", "race"),
    "codes past the end": Mutant(SEARCH, "row < matrix.rows && channel < matrix.channels);",
                                 "channel < matrix.channels);", "out_of_bounds"),
    "channels past the end": Mutant(SEARCH, "row < matrix.rows && channel < matrix.channels);", "row < matrix.rows);",
                                    "out_of_bounds"),
    "codes of the padding are chosen": Mutant(SEARCH, ": -INFINITY;\n}", ": 0.0f;\n}", "values"),
    "of equal scores the last": Mutant(SEARCH, "b.index < a.index", "b.index > a.index", "ties"),
    "lanes look at the wrong codes": Mutant(SEARCH, "codes + 8 * j * kChunkPitch", "codes + j * kChunkPitch", "values"),
    "no check of the alignment": Mutant(SEARCH, "reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 && ", "",
                                        "misaligned"),
    "rows past the end": Mutant("nearest_code.cuh", " || row >= a.z.rows) return;", ") return;", "out_of_bounds"),
    "splits overlap": Mutant("nearest_code.cuh", "int64_t(blockIdx.y) * a.z.rows + row] = best",
                             "int64_t(blockIdx.y) * (a.z.rows - 1) + row] = best", "cross_block_race"),
    "vectors are not counted from the centre": Mutant(
        "nearest_code.cuh", "to_float(from[row * stride + c]) - point;",
        "to_float(from[row * stride + c]) - (of_codes ? point : 0.0f);", "far"),
    "a warp leaves early": Mutant("nearest_code.cuh", "if (code >= codebook.rows) return;",
                                  "if (code >= codebook.rows || lane >= codebook.channels) return;", "deadlock"),
}  # fmt: skip


def nearest_far():
    return nearest_code(*problem_far_from_the_origin(), backend="reference")


def steps(faulty, looked_for):
    z, codebook = randn(13, 28, seed=1), randn(700, 28, seed=2)
    # To find wrong values, all scores are negative, so that a score of 0 in the padding behind the codes would win.
    z, codebook = z - 2 * (looked_for == "values"), codebook + 2 * (looked_for == "values")
    if looked_for == "misaligned":
        z = torch.nn.functional.pad(z, (1, 3))[:, 1:-3]
    if looked_for == "ties":
        codebook[5:] = z[:1]
        yield lambda: {"ties"} if search(z, codebook, "l2", faulty)[0] > 5 else set()
    if looked_for == "far":
        far, far_codes = problem_far_from_the_origin()
        yield lambda: {"far"} if (search(far, far_codes, "l2", faulty) != nearest_far()).any() else set()
    # Vectors keep the alignment of the caller's only if nothing is subtracted from them.
    metric = "cosine" if looked_for in ("deadlock", "misaligned") else "l2"
    yield lambda: assert_nearest(search(z, codebook, metric, faulty, seed=1), z, codebook, metric)


@pytest.mark.parametrize("name", parameters(MUTANTS, others=pytest.mark.evidence))
def test_planted_faults_are_found(name, selected):
    assert_found(SOURCE, MUTANTS, name, steps, selected("name"), ("float",))


@pytest.mark.evidence
def test_nothing_is_found_without_a_fault():
    assert_nothing_found(SOURCE, MUTANTS, steps)
