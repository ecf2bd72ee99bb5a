"""The report on compiled kernels: its bounds, what its check refuses, the files that it writes, and its command."""

import dataclasses
import json
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from tools.report import __main__ as command
from tools.report import bounds, budgets, cuda_source, occupancy, tables
from tools.report.rows import Failure, Row
from tools.report.sources import SOURCES, rows
from tools.report.triton_source import record
from var_kernels.triton.problems import PROBLEMS
from var_kernels.triton.targets import TARGETS

# ---- Bounds


def _problem(op, name):
    return next(problem for problem in PROBLEMS if problem.key == (op, name))


def test_bytes_operations_and_bound_of_a_problem():
    problem = _problem("block_causal_attention", "d16 bf16 forward")
    lens = [side * side for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]
    visible = sum(length * sum(lens[: i + 1]) for i, length in enumerate(lens))
    assert problem.operations == 8 * 16 * visible * 4 * 64
    assert problem.bytes == 8 * 16 * 680 * (4 * 64 * 2 + 4)  # q, k, v, out; lse
    assert bounds.problem_bound(problem, "sm_80") == bounds.Bound(problem.operations / 312e12, "arithmetic")
    adaln = _problem("adaln_layer_norm", "d16 fp32 forward")
    assert adaln.bytes == 4 * (2 * 8 * 680 * 1024 + 2 * 8 * 1024 + 2 * 8 * 680)
    assert bounds.problem_bound(adaln, "sm_90") == bounds.Bound(adaln.bytes / 3350e9, "memory")


def test_only_the_visible_part_of_a_cache_counts():
    step = _problem("block_causal_attention", "d16 last scale on a cache bf16 forward")
    assert step.operations == 8 * 16 * 256 * 680 * 4 * 64
    assert step.bytes == 8 * 16 * ((2 * 256 + 2 * 680) * 64 * 2 + 256 * 4)


def test_loop_bound():
    counts = Counter({"instructions": 449, "fp32": 134, "exp": 34, "tensor HMMA": 64})
    loop = bounds.loop_bound("sm_80", counts, [("HMMA 16", 4096)] * 64)
    assert loop.cycles == {"issue": 449, "fp32": 134 * 2, "exp": 34 * 8, "tensor": 64 * 4096 / 512}
    assert (loop.limit, loop.tensor_ceiling) == ("tensor", 1.0)
    # The published peak of H100 is that of HGMMA. The peak of HMMA there is not documented, so it gets no estimate.
    loop = bounds.loop_bound("sm_90", counts, [("HMMA 16", 4096)] * 64)
    assert (loop.limit, loop.tensor_ceiling) == ("not known", None)
    loop = bounds.loop_bound("sm_100", counts, [None] * 8)
    assert (loop.limit, loop.tensor_ceiling) == ("not known", None)
    without = bounds.loop_bound("sm_80", Counter({"instructions": 50, "fp32": 40}), [])
    assert (without.limit, without.tensor_ceiling) == ("fp32", None)
    amd = bounds.loop_bound("gfx942", Counter({"instructions": 90, "vector": 50}), [("MFMA 16", 16384)] * 10)
    assert amd.cycles == {"vector": 200, "tensor": 320} and amd.tensor_ceiling == 1.0


# ---- Budgets

ALL = ("triton",)  # the backends whose kernels the report includes completely


def _row(**changes):
    row = Row(
        op="op", problem="d16", backend="triton", kernel="stem.forward", target="sm_80", config="", programs=1,
        threads=128, launches=1,
        registers=100, accumulators=0, scalars=0, spills=0, stack=0, shared_memory=40960, has_16bit_products=True,
        occupancy=occupancy.Occupancy(4, 0.25, "registers"), loop=None,
        counts={"loads": 10, "loads wide": 10, "stores": 4, "stores wide": 3, "tensor HMMA": 64},
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def _counts(**changes):
    return {**_row().counts, **{name.replace("_", " "): value for name, value in changes.items()}}


BUDGETS = budgets.update([_row()], {}, complete=ALL)


def test_budget_of_a_kernel():
    assert BUDGETS == {
        "op | d16 | triton | stem.forward | sm_80": {
            "registers": 104, "shared_memory": 40960, "loads": 0.95, "stores": 0.7, "tensor": ["HMMA"],
        }
    }  # fmt: skip
    assert budgets.check([_row()], BUDGETS, complete=ALL) == []
    assert budgets.check([_row(registers=104, counts=_counts(loads=10, stores=4))], BUDGETS, complete=ALL) == []


@pytest.mark.parametrize(
    "changes, violation",
    [
        ({"spills": 12, "stack": 48}, "spills: expected none, got 12, 48 bytes of local memory per thread"),
        ({"registers": 105}, "registers: expected at most 104, got 105"),
        ({"shared_memory": 40976}, "shared memory: expected at most 40960, got 40976"),
        ({"counts": _counts(loads_wide=9)}, "loads of 128 bits: expected a share of at least 0.95, got 0.90"),
        ({"counts": _counts(stores_wide=0)}, "stores of 128 bits: expected a share of at least 0.70, got 0.00"),
        (
            {"counts": _counts(rounded_fp32=8)},
            "tensor cores: expected IEEE products of fp32, got 8 instructions in tf32",
        ),
        ({"counts": _counts(atomics=1)}, "atomics: expected none, because the order of sums must not vary, got 1"),
    ],
)
def test_violation(changes, violation):
    found = budgets.check([_row(**changes)], BUDGETS, complete=ALL)
    assert found == [f"op, d16, triton, stem.forward, sm_80: {violation}"]


def test_lost_tensor_cores():
    counts = {"loads": 10, "loads wide": 10, "stores": 4, "stores wide": 4}
    assert budgets.check([_row(counts=counts)], BUDGETS, complete=ALL) == [
        "op, d16, triton, stem.forward, sm_80: tensor cores: expected instructions for the products of 16-bit "
        "matrices, got none",
        "op, d16, triton, stem.forward, sm_80: tensor cores: expected instructions HMMA, got none",
    ]
    # The budget names the kind of instruction, so that a change from wgmma to mma is found.
    hopper = _row(target="sm_90", counts={**counts, "tensor HGMMA": 8})
    fallen = _row(target="sm_90", counts={**counts, "tensor HMMA": 64})
    assert budgets.check([fallen], budgets.update([hopper], {}, complete=ALL), complete=ALL) == [
        "op, d16, triton, stem.forward, sm_90: tensor cores: expected instructions HGMMA, got HMMA"
    ]


def test_more_shared_memory_than_the_card_has():
    row = _row(target="sm_86", shared_memory=102400)
    assert budgets.check([row], budgets.update([row], {}, complete=ALL), complete=ALL) == [
        "op, d16, triton, stem.forward, sm_86: shared memory: expected at most the card's 101376 bytes, got 102400"
    ]


def test_scratch_of_amd_is_a_spill():
    row = _row(target="gfx942", stack=16)
    assert budgets.check([row], budgets.update([row], {}, complete=ALL), complete=ALL) == [
        "op, d16, triton, stem.forward, gfx942: spills: expected none, got 0, 16 bytes of scratch per thread"
    ]


def test_kernels_without_budget_and_budgets_without_kernel():
    other = _row(problem="d36")
    assert budgets.check([other], BUDGETS, complete=ALL) == [
        "op, d36, triton, stem.forward, sm_80: has no budget; --update-budgets records one",
        "op, d16, triton, stem.forward, sm_80: is no longer launched; --update-budgets removes it",
    ]
    assert len(budgets.check([other], BUDGETS, complete=())) == 1
    assert set(budgets.update([other], BUDGETS, complete=())) == {*BUDGETS, "op | d36 | triton | stem.forward | sm_80"}
    assert set(budgets.update([other], BUDGETS, complete=ALL)) == {"op | d36 | triton | stem.forward | sm_80"}


def test_budgets_of_a_backend_that_was_not_looked_at_stay():
    other = _row(backend="cuda", kernel="stem.forward_kernel<bf16>")
    both = budgets.update([other], BUDGETS, complete=("cuda",))
    assert [key.split(" | ")[2] for key in both] == ["triton", "cuda"]
    assert budgets.check([_row()], both, complete=ALL) == budgets.check([other], both, complete=("cuda",)) == []
    assert budgets.update([_row()], both, complete=ALL) == both


def test_failure_to_compile_is_a_violation():
    failure = Failure("op", "d16", "triton", "sm_80", "CompilationError: at 1:2")
    assert budgets.check([failure], BUDGETS, complete=ALL) == [
        "op, d16, triton on sm_80: does not compile: CompilationError: at 1:2"
    ]


def test_the_worst_specialisation_counts():
    both = [_row(registers=90, counts=_counts(loads_wide=5)), _row(registers=120)]
    (worst,) = budgets.measure(both).values()
    assert (worst["registers"], worst["loads"]) == (120, 0.5)


def test_budget_file(tmp_path):
    path = tmp_path / "budgets.json"
    releases = {"Triton": "3.9.0", "nvcc": "13.0"}
    assert budgets.load(path) == ({}, {})
    budgets.save(BUDGETS, releases, path)
    assert budgets.load(path) == (BUDGETS, releases)
    assert [entry.name for entry in tmp_path.iterdir()] == ["budgets.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match="budgets.json: expected the budgets that --update-budgets writes, got"):
        budgets.load(path)


def test_committed_budgets_cover_every_problem_and_target():
    keys = [key.split(" | ") for key in budgets.load()[0]]
    assert {(op, problem, backend, target) for op, problem, backend, _, target in keys} == {
        (*problem.key, backend, target)
        for backend, source in SOURCES.items() for problem in PROBLEMS for target in problem.targets
        if source.unit(problem, target) is not None
    }  # fmt: skip


# ---- Files and command
# ---- Tables and command

OPS = tuple(dict.fromkeys(problem.op for problem in PROBLEMS))

def test_a_file_for_each_op():
    row = _row(op="sample_tokens", problem="last scale of 8 images fp32")
    texts = tables.files(PROBLEMS, ["sm_80"], [row])
    assert set(texts) == {"cards.md", *(f"{op}.md" for op in OPS)}
    assert all(text.startswith(f"{tables.WRITTEN}\n\n# {name[:-3]}\n") for name, text in texts.items())
    # The bounds, the resources and the accesses; the row has no loop.
    assert {name: text.count("\n| --- |") for name, text in texts.items()} == {
        **dict.fromkeys(texts, 1), "sample_tokens.md": 3,
    }  # fmt: skip
    assert "| sm_80 | A100 SXM 80 GB |" in texts["cards.md"]
    assert "| triton | forward | 100r 40K 25% HMMA |" in texts["sample_tokens.md"]


def test_tables_of_an_op_that_is_gone_are_removed(tmp_path):
    folder = tmp_path / "generated"
    tables.write(folder, {"a.md": f"{tables.WRITTEN}\nold", "b.md": f"{tables.WRITTEN}\n"})
    (folder / "by_hand.md").write_text("kept")
    tables.write(folder, {"a.md": "new"})
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a.md": "new", "by_hand.md": "kept"}


def test_committed_tables_of_cards_and_bounds_are_those_of_the_report():
    texts = tables.files(PROBLEMS, list(TARGETS), [])
    assert {path.name for path in tables.GENERATED.iterdir()} == set(texts)
    for name, text in texts.items():  # the bounds come first in the file of an op
        committed = (tables.GENERATED / name).read_text(encoding="utf-8")
        assert committed.startswith(text), f"{name}: --write-tables docs/generated"


def test_a_committed_table_of_other_code_is_a_violation(tmp_path):
    texts = {"a.md": "as written", "b.md": "as written"}
    tables.write(tmp_path, texts)
    assert tables.stale(tmp_path, texts) == []
    (tmp_path / "a.md").write_text("of older code")
    (tmp_path / "gone.md").write_text("of a kernel that is gone")
    found = tables.stale(tmp_path, texts | {"new.md": "as written"})
    assert [sentence.partition(":")[0].partition("/")[2] for sentence in found] == ["a.md", "gone.md", "new.md"]


def test_problems_have_names_of_their_own():
    assert len({problem.key for problem in PROBLEMS}) == len(PROBLEMS)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target", "sm_70"], "--target: expected one of sm_80, .*, got 'sm_70'"),
        (["--op", "softmax"], "--op: expected one of block_causal_attention, .*, got 'softmax'"),
        (["--problem", "d99"], "--problem: expected a part of one of: d16 bf16 forward; .*, got 'd99'"),
        (["--problem", "D 72", "--target", "sm_89"], "--target: expected one of those that .*, gfx942, sm_100, "),
        (["--backend", "cutlass"], "--backend: expected one of triton, cuda, got 'cutlass'"),
        (["--backend", "cuda", "--target", "gfx942"], "--target: expected one of those that .*, sm_100, sm_120, "),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--write-tables", "x", "--target", "sm_80"], "--write-tables: expected no --target"),
        (["--write-tables", "x", "--backend", "triton"], "--write-tables: expected no --target"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_without_triton(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert command.main(["--check"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["nvdisasm", "cuobjdump"])
def test_without_a_disassembler(tool, monkeypatch, capsys, tmp_path):
    triton = pytest.importorskip("triton")
    found = {name: SimpleNamespace(path=sys.executable) for name in ("nvdisasm", "cuobjdump")}
    found[tool].path = str(tmp_path / tool)
    monkeypatch.setattr(triton.knobs, "nvidia", SimpleNamespace(**found))
    assert command.main(["--check"]) == 2
    assert f"{tool}: expected Triton's at {tmp_path / tool}, got no file" in capsys.readouterr().err


# ---- From a call to its row


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_a_real_kernel(target):
    pytest.importorskip("triton")
    problem = _problem("adaln_layer_norm", "d16 bf16 forward")
    (row,) = rows(problem, target, "triton")
    assert row.key == ("adaln_layer_norm", problem.name, "triton", "adaln_layer_norm.adaln_forward", target)
    assert row.programs == record(problem, target)[0].grid[0] and row.launches == 1
    assert not row.spills and 16 <= row.registers <= 255 and row.counts["instructions"] > 100
    assert 0 <= row.wide_share("loads") <= 1 and 0 <= row.wide_share("stores") <= 1
    assert not row.has_16bit_products and not row.tensor
    assert 1 <= row.occupancy.blocks and row.threads % TARGETS[target].warp_size == 0


def test_the_command(tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("COLUMNS", "250")
    file = tmp_path / "report.json"
    options = ["--op", "adaln_layer_norm", "--problem", "d16 bf16 forward", "--target", "sm_80", "--backend", "triton"]
    assert command.main([*options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "not measurements" in printed and "adaln_forward" in printed
    report = json.loads(file.read_text())
    (kernel,) = report["kernels"]
    assert kernel["kernel"] == "adaln_layer_norm.adaln_forward" and kernel["occupancy"]["blocks"] >= 1
    assert report["problems"][0]["static_bounds"]["sm_80"]["limit"] == "memory"
    monkeypatch.setattr(budgets, "load", lambda: ({}, {"Triton": "2.1.0"}))
    assert command.main([*options, "--check"]) == 1
    printed = capsys.readouterr().out
    assert "has no budget" in printed and "the budgets are those of Triton 2.1.0, this is" in printed


# ---- CUDA C++


def test_a_gpu_runs_the_newest_code_of_its_generation():
    archs = {name: cuda_source.arch_of(name) for name, target in TARGETS.items() if target.api == "cuda"}
    assert archs == {
        "sm_80": "sm_80", "sm_86": "sm_80", "sm_89": "sm_80",
        "sm_90": "sm_90a", "sm_100": "sm_100a", "sm_120": "sm_120",
    }  # fmt: skip


@pytest.mark.evidence  # it compiles a file that the tests of its op compile as well
def test_a_real_cuda_kernel():
    pytest.importorskip("triton")
    if reason := cuda_source.unavailable_reason():
        pytest.skip(reason)
    problem = _problem("adaln_layer_norm", "d16 bf16 backward")
    backward, sums = rows(problem, "sm_86", "cuda")
    assert backward.key[2:] == ("cuda", "adaln_layer_norm.backward_kernel<bf16, false, 1>", "sm_86")
    assert sums.kernel.startswith("adaln_layer_norm.sum_partials_kernel")
    for row in (backward, sums):
        assert not row.spills and not row.stack and 16 <= row.registers <= 128 and row.counts["instructions"] > 50
        assert row.occupancy.blocks >= 1 and row.programs >= 8 and row.config == "code for sm_80"


def test_a_backend_that_is_left_out_is_named_with_the_reason(monkeypatch, capsys, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setattr(cuda_source, "unavailable_reason", lambda: "nvcc is not installed")
    sentence = "the cuda kernels and their budgets were not looked at: nvcc is not installed"
    options = ["--op", "adaln_layer_norm", "--problem", "d16 bf16 forward", "--target", "sm_80"]
    monkeypatch.setenv("COLUMNS", "250")
    assert command.main([*options, "--check"]) == 0
    assert sentence in capsys.readouterr().out
    file = tmp_path / "report.json"
    assert command.main([*options, "--json", str(file)]) == 0
    assert sentence in capsys.readouterr().out
    assert json.loads(file.read_text())["not looked at"] == {"cuda": "nvcc is not installed"}
    for arguments in ([*options, "--backend", "cuda"], ["--write-tables", "folder"]):
        assert command.main(arguments) == 2
        assert sentence in capsys.readouterr().err
