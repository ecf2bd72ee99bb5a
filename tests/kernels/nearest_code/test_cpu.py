"""nearest_code on the CPU: exactness within a derived bound of rounding, ties, special values, layouts, arguments."""

import pytest
import torch

from tests.kernels.nearest_code.contract import (
    assert_as_exact_as_near_the_origin,
    assert_nearest,
    problem_of_tiny_codes,
    problems_of_small_integers,
    problems_with_special_values,
)
from var_kernels import nearest_code
from var_kernels.reference.nearest_code import centre_of
from var_kernels.testing import poison, randn

METRICS = ("l2", "cosine")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Codes straddle vectors (4, 8, 16) and strips (8, 16, 64) of every ISA level. Rows straddle the register tile (6) and
# the block of a task (96). Channels have no tiles, but must work from 1 up to those of the widest codebooks.
CODES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200)
ROWS = (1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 95, 96, 97, 193)
CHANNELS = (1, 2, 3, 8, 31, 32, 33, 256)


# ---- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_within_rounding(backend, metric):
    for channels in CHANNELS:
        for rows, codes in zip(ROWS, (*CODES[-11:], 1000, 70, 300), strict=True):
            z, codebook = randn(rows, channels, seed=rows), randn(codes, channels, seed=codes + 7)
            assert_nearest(nearest_code(z, codebook, metric=metric, backend=backend), z, codebook, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_several_codebooks(backend, metric):
    z, codebooks = randn(3, 11, 4, 8, seed=1), randn(4, 33, 8, seed=2)
    found, hits = nearest_code(z, codebooks, metric=metric, return_hits=True, backend=backend)
    assert found.shape == (3, 11, 4) and hits.shape == (4, 33)
    for group in range(4):
        alone = nearest_code(z[:, :, group], codebooks[group], metric=metric, backend=backend)
        assert torch.equal(found[:, :, group], alone)
        assert torch.equal(hits[group], torch.bincount(alone.flatten(), minlength=33))


@pytest.mark.parametrize("shape", [(97, 8), (3, 5, 8), (0, 8)])
def test_hits_count_the_chosen_codes(backend, shape):
    z, codebook = randn(*shape, seed=3), randn(20, 8, seed=4)
    found, hits = nearest_code(z, codebook, return_hits=True, backend=backend)
    assert torch.equal(found, nearest_code(z, codebook, backend=backend))
    assert hits.dtype == torch.int64 and torch.equal(hits, torch.bincount(found.flatten(), minlength=20))


def test_near_ties_within_rounding(backend):
    # All codes lie around a point far from 0, so that the scores of a row differ by little more than their rounding.
    z = randn(97, 32, seed=1, std=1e-3) + 3
    codebook = randn(500, 32, seed=2, std=1e-3) + 3
    assert_nearest(nearest_code(z, codebook, backend=backend), z, codebook, "l2")


def test_codes_far_from_the_origin(backend):
    assert_as_exact_as_near_the_origin(lambda z, codebook: nearest_code(z, codebook, backend=backend))


def test_codes_far_from_the_origin_in_float64():
    # At 1e8 the scores of float64 round by 50, if they are not counted from a point near the codes.
    z, codebook = randn(70, 32, seed=1, dtype=torch.float64), randn(300, 32, seed=2, dtype=torch.float64)
    expected = nearest_code(z, codebook)
    assert torch.equal(nearest_code(z + 1e8, codebook + 1e8), expected)


def test_nothing_is_subtracted_from_codes_around_the_origin():
    # So their scores are rounded as those of other implementations, and tokens stay the same.
    codebook = randn(500, 32, seed=2)
    codebook[:, :3] += 1.5
    assert not centre_of(codebook).any()
    codebook[:, 3] += 100
    codebook[0, 3] = torch.nan
    assert centre_of(codebook).nonzero().tolist() == [[3]]
    assert not centre_of(torch.full((4, 2), torch.nan)).any()


def test_exact_on_small_integers(backend):
    for z, codebook, first in problems_of_small_integers((rows, codes) for codes in CODES for rows in ROWS):
        assert torch.equal(nearest_code(z, codebook, backend=backend), first), (z.shape, codebook.shape)


def test_agrees_with_the_expanded_formula(cpu):
    # This is |c|² - 2 z·c in plain torch and fp32. Rows where the two differ are near-ties, which either may resolve.
    z, codebook = randn(700, 32, seed=1), randn(4096, 32, seed=2)
    plain = torch.addmm(codebook.square().sum(-1), z, codebook.T, alpha=-2).argmin(-1)
    ours = nearest_code(z, codebook, backend="cpu")
    assert_nearest(plain, z, codebook, "l2")
    assert_nearest(ours, z, codebook, "l2")
    assert (plain != ours).sum() <= 2


def test_cosine_ignores_lengths(backend):
    z, codebook = randn(50, 16, seed=1), randn(300, 16, seed=2)
    expected = nearest_code(z, codebook, metric="cosine", backend=backend)
    stretched = codebook * (torch.arange(300) % 5 + 1).unsqueeze(1)
    assert_nearest(nearest_code(8 * z, stretched, metric="cosine", backend=backend), z, stretched, "cosine")
    assert torch.equal(nearest_code(8 * z, codebook * 4, metric="cosine", backend=backend), expected)


def test_cosine_of_tiny_codes(backend):
    assert nearest_code(*problem_of_tiny_codes(), metric="cosine", backend=backend).item() == 2


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_inputs_are_widened_exactly(backend, metric, dtype):
    z, codebook = randn(97, 24, seed=1, dtype=dtype), randn(333, 24, seed=2, dtype=dtype)
    expected = nearest_code(z.float(), codebook.float(), metric=metric, backend=backend)
    assert torch.equal(nearest_code(z, codebook, metric=metric, backend=backend), expected)


# ---- ties ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_first_of_equal_codes_at_every_position(cpu, metric):
    # The code at `first` equals all later ones, in other lanes, vectors and strips. 13 rows make tiles of 6, 6 and 1.
    target = randn(1, 19, seed=1)
    z = target + randn(13, 19, seed=2, std=0.01)
    far = -target + randn(150, 19, seed=3, std=0.1)
    for first in range(150):
        codebook = far.clone()
        codebook[first:] = target
        index = nearest_code(z, codebook, metric=metric, backend="cpu")
        assert (index == first).all(), f"expected {first}, got {index.tolist()}"


def test_first_of_two_equal_codes(cpu):
    # The two are in one vector, in one strip, or in different strips.
    target, far = randn(1, 19, seed=1), -randn(1, 19, seed=1)
    z = target + randn(7, 19, seed=2, std=0.01)
    for first, second in [(i, j) for i in (0, 1, 15, 16, 63, 64, 100) for j in range(i + 1, 150)]:
        codebook = far.repeat(150, 1)
        codebook[[first, second]] = target
        assert (nearest_code(z, codebook, backend="cpu") == first).all(), (first, second)


def test_all_codes_equal(backend):
    for codes in CODES:
        codebook = randn(1, 5, seed=1).expand(codes, 5)
        assert not nearest_code(randn(13, 5, seed=2).bfloat16().float(), codebook, backend=backend).any()


# ---- special values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
def test_nan_and_inf_are_the_same_in_both_backends(cpu, metric):
    for case, (z, codebook) in enumerate(problems_with_special_values(40, 90, 30)):
        ours = nearest_code(z, codebook, metric=metric, backend="cpu")
        assert torch.equal(ours, nearest_code(z, codebook, metric=metric, backend="reference")), case


@pytest.mark.parametrize("metric", METRICS)
def test_nan_rows_get_zero_and_nan_codes_are_never_chosen(backend, metric):
    z, codebook = randn(9, 6, seed=1), randn(90, 6, seed=2)
    z[4, 2] = torch.nan
    codebook[:70, 3] = torch.nan
    index = nearest_code(z, codebook, metric=metric, backend=backend)
    assert index[4] == 0
    others = [row for row in range(9) if row != 4]
    assert_nearest(index[others] - 70, z[others], codebook[70:], metric)
    assert not nearest_code(z, torch.full_like(codebook, torch.nan), metric=metric, backend=backend).any()


def test_infinitely_far_codes_are_never_chosen(backend):
    z, codebook = randn(9, 6, seed=1), randn(90, 6, seed=2)
    codebook[:70, 3] = torch.inf
    assert (nearest_code(z, codebook, backend=backend) >= 70).all()


def test_infinite_row_takes_the_first_code_of_infinite_score(backend):
    codebook = torch.tensor([[-1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert nearest_code(torch.tensor([torch.inf, 0.0]), codebook, backend=backend) == 1


# ---- layouts and the call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 3, 7), (2, 0, 7), (0, 7), (2, 3, 4, 5, 7)], ids=str)
def test_shapes(backend, shape):
    z, codebook = randn(*shape, seed=1), randn(11, 7, seed=2)
    index = nearest_code(z, codebook, backend=backend)
    assert index.shape == shape[:-1] and index.dtype == torch.int64
    assert torch.equal(index.reshape(-1), nearest_code(z.reshape(-1, 7), codebook, backend="reference"))


def test_no_channels(backend):
    assert torch.equal(nearest_code(torch.zeros(3, 0), torch.zeros(4, 0), backend=backend), torch.zeros(3).long())


def test_strided_inputs(backend):
    z, codebook = randn(4, 9, 7, seed=1), randn(30, 7, seed=2)
    expected = nearest_code(z, codebook, backend=backend)
    feature_map = z.permute(0, 2, 1).contiguous()  # channels first, as in the output of a convolution
    assert torch.equal(nearest_code(feature_map.permute(0, 2, 1), codebook, backend=backend), expected)
    columns = codebook.T.contiguous().T
    assert torch.equal(nearest_code(z, columns, backend=backend), expected)
    wide = torch.cat([codebook, codebook], dim=1)[:, :7]
    assert torch.equal(nearest_code(z[:, ::2], wide, backend=backend), expected[:, ::2])


def test_no_gradient(backend):
    z, codebook = randn(5, 7, seed=1).requires_grad_(), randn(11, 7, seed=2).requires_grad_()
    assert not nearest_code(z, codebook, backend=backend).requires_grad


def test_changed_codebook_is_noticed(cpu):
    z, codebook = randn(5, 7, seed=1), randn(500, 7, seed=2)
    nearest_code(z, codebook, backend="cpu")
    codebook[123] = z[0]
    assert nearest_code(z, codebook, backend="cpu")[0] == 123


def test_writes_every_element(cpu):
    z, codebook = randn(1000, 8, seed=1), randn(90, 8, seed=2)
    expected = nearest_code(z, codebook, backend="cpu")
    poison()
    assert torch.equal(nearest_code(z, codebook, backend="cpu"), expected)


def test_equal_for_any_number_of_threads(cpu, restore_threads):
    z, codebook = randn(600, 32, seed=1), randn(1000, 32, seed=2)
    results = []
    for count in (1, 2, 3, 4, 1):
        torch.set_num_threads(count)
        results.append(nearest_code(z, codebook, backend="cpu"))
    assert all(torch.equal(result, results[0]) for result in results)


def test_matmul_precision_settings_do_not_matter(backend):
    z, codebook = randn(200, 32, seed=1), randn(2000, 32, seed=2)
    expected = nearest_code(z, codebook, backend=backend)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # lets torch's own fp32 matmul use bf16 products
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(nearest_code(z, codebook, backend=backend), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_autocast_widens_mixed_dtypes(backend):
    z, codebook = randn(50, 8, seed=1), randn(90, 8, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        index = nearest_code(z.bfloat16(), codebook, backend=backend)
    assert torch.equal(index, nearest_code(z.bfloat16().float(), codebook, backend=backend))


WRONG = [
    ("z", lambda: torch.tensor(1.0), ValueError, "z: expected at least 1 dimension"),
    ("z", lambda: torch.zeros(5, 7).int(), TypeError, "z: expected float32, bfloat16, float16 or float64"),
    ("z", lambda: None, TypeError, "z: expected a torch.Tensor, got NoneType"),
    ("codebook", lambda: torch.zeros(7), ValueError, "codebook: expected 2 or 3 dimensions"),
    ("codebook", lambda: torch.zeros(0, 7), ValueError, "codebook: expected at least one code"),
    ("codebook", lambda: torch.zeros(7, 9), ValueError, r"codebook: expected shape \(V, 7\) .* got \(7, 9\)"),
    ("codebook", lambda: torch.zeros(3, 9, 7), ValueError, r"codebook: expected shape \(5, V, 7\) .* got \(3, 9, 7\)"),
    ("codebook", lambda: torch.zeros(9, 7).half(), TypeError, "codebook: expected torch.float32 like z, got torch.fl"),
    (
        "codebook",
        lambda: torch.zeros(9, 7, device="meta"),
        ValueError,
        "codebook: expected device cpu like z, got meta",
    ),
    ("metric", lambda: "dot", ValueError, "metric: expected 'l2' or 'cosine', got 'dot'"),
    ("backend", lambda: "faiss", ValueError, "backend: expected one of auto, cpu, cuda, triton, reference"),
]


@pytest.mark.parametrize("argument, make, error, message", WRONG)
def test_wrong_arguments(argument, make, error, message):
    arguments = {"z": torch.zeros(5, 7), "codebook": torch.zeros(9, 7)}
    with pytest.raises(error, match=message):
        nearest_code(**arguments | {argument: make()})


def test_float64_is_served_by_the_reference(cpu):
    z, codebook = randn(5, 7, seed=1, dtype=torch.float64), randn(11, 7, seed=2, dtype=torch.float64)
    assert torch.equal(nearest_code(z, codebook), nearest_code(z, codebook, backend="reference"))
    with pytest.raises(ValueError, match="'cpu' cannot serve nearest_code .*expected one of auto, reference"):
        nearest_code(z, codebook, backend="cpu")


def test_raw_op_checks_its_arguments(cpu):
    op = torch.ops.var_kernels._nearest_code
    with pytest.raises(RuntimeError, match="z: expected 2 dimensions, got 1"):
        op(torch.zeros(7), torch.zeros(9, 7), False)
    with pytest.raises(RuntimeError, match="codebook: expected 7, got 6 channels"):
        op(torch.zeros(5, 7), torch.zeros(9, 6), False)
    with pytest.raises(RuntimeError, match="codebook: expected at least one code"):
        op(torch.zeros(5, 7), torch.zeros(0, 7), False)
    with pytest.raises(RuntimeError, match="z: expected float32, bfloat16 or float16, got Double"):
        op(torch.zeros(5, 7).double(), torch.zeros(9, 7).double(), False)


# ---- torch's tools, memory, ISA levels -----------------------------------------------------------------------------


def test_opcheck(cpu):
    for dtype in DTYPES:
        arguments = (randn(5, 7, seed=1, dtype=dtype), randn(11, 7, seed=2, dtype=dtype), False)
        torch.library.opcheck(torch.ops.var_kernels._nearest_code.default, arguments)


def test_compile_and_export(cpu):
    class Module(torch.nn.Module):
        def forward(self, z, codebook):
            return nearest_code(z, codebook, metric="cosine")

    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    codebook = randn(50, 7, seed=2)
    for rows in (3, 8, 5):
        z = randn(2, rows, 7, seed=rows)
        expected = nearest_code(z, codebook, metric="cosine")
        assert torch.equal(compiled(z, codebook), expected)
    exported = torch.export.export(Module(), (z, codebook))
    assert any("var_kernels" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(z, codebook), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(cpu):
    z, codebook = randn(3, 5, 7, seed=1), randn(50, 7, seed=2)
    expected = nearest_code(z, codebook)
    assert torch.equal(torch.vmap(nearest_code, (0, None))(z, codebook), expected)
    assert torch.equal(torch.vmap(nearest_code, (2, None))(z.movedim(0, -1), codebook), expected)


def test_no_matrix_of_all_scores(backend, peak_growth):
    # A matrix of 20 000 rows and 4 096 codes would take 330 MB in fp32.
    preparation = f"""
import torch
from var_kernels import nearest_code
torch.set_num_threads(1)
run = lambda rows: nearest_code(torch.ones(rows, 2), torch.ones(4096, 2), backend={backend!r})
run(600)"""
    assert peak_growth(preparation, "run(20000)") < 60 << 20
