"""The emulation of CUDA kernels: right kernels pass, and every planted fault is found by the layer named here.

A planted fault is a deliberate error in a kernel. The kernels are in tools/gpu_emulation/cuda/micro.cu. The layers are
the reports of the fast build ("fast"), wrong values in the fast build ("values"), the reports of the race build
("race"), the counter of bank conflicts ("conflicts"), and the findings of AddressSanitizer and
UndefinedBehaviorSanitizer ("sanitized").
"""

import ctypes
import functools
import json
import shutil
import uuid

import pytest
import torch

from tools.gpu_emulation.cuda import EmulationError, build, load
from tools.gpu_emulation.cuda.sanitized import run_sanitized
from var_kernels.native import build as native_build
from var_kernels.testing import randn

if build.unavailable_reason() is not None:
    pytest.skip(build.unavailable_reason(), allow_module_level=True)

SOURCES = (build.HERE / "micro.cu",)
SEEDS, LANDINGS = (0, 1, 2, 7), (True, False)
RAGGED = 50  # no multiple of 32 or 4: with a round length, faults in the code for tails have no effect


@functools.cache
def kernel(variant):
    emulation = load(variant, SOURCES)
    function = ctypes.CDLL(str(emulation.path)).run_micro_kernel
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    return emulation, function


def micro_input(name, n):
    """An input that is exactly as long as the kernel may read."""
    if name.startswith("multiply"):
        return randn(80, 64, seed=1, dtype=torch.bfloat16).view(torch.float32).flatten()
    if name.startswith("copy_ragged"):
        return randn(n, seed=1)
    if name.startswith("pipeline"):
        return randn(n if "past the end" in name else 256, seed=1)
    return randn(64, seed=1)


def expected(name, source, n):
    base = name.partition(":")[0]
    thread = torch.arange(64)
    out = torch.zeros(1024)
    if base == "multiply":
        a, b = source.view(torch.bfloat16).view(80, 64).float().split([16, 64])
        return (a @ b).flatten()
    if base == "pipeline":
        chunks = torch.cat([source[: n // 4 * 4], torch.zeros(256)])[:256].view(4, 64)
        out[:64] = chunks[:, thread ^ 33].sum(0)
    elif base == "accumulate":
        out[:64] = 2 * source
    elif base == "copy_ragged":
        out[:n] = source
    else:
        value = {
            "exchange_in_warp": source[thread ^ 1],
            "reverse_in_block": source + 2,
            "shuffle_in_tail": torch.where(thread < n, source[thread ^ 1], 0),
            "shuffle_with_ballot": torch.where(thread % 2 == 1, source[thread // 32 * 32 + 1], source),
        }[base]
        out[:128] = value.repeat(2)
    return out


def run(variant, name, *, n=RAGGED, seed=0, late_copies=True):
    """The values and the counters of a run; raises EmulationError with its findings."""
    emulation, function = kernel(variant)
    source = micro_input(name, n)
    # Exactly as large as the kernel may write. Elements that it does not write stay 0.
    out = torch.zeros(n if name.startswith("copy_ragged") else 1024)
    with emulation.run(seed=seed, late_copies=late_copies, source=source, out=out) as record:
        error = function(name.encode(), source.data_ptr(), out.data_ptr(), n)
        if error:
            raise RuntimeError(f"error {error}")
    return out, record.counters


def is_right(name, out, n):
    want = expected(name, micro_input(name, n), n)[: out.numel()]
    tolerance = 1e-4 if name.startswith("multiply") else 1e-6
    return torch.allclose(out, want, rtol=tolerance, atol=tolerance)


RIGHT = ("exchange_in_warp", "reverse_in_block", "accumulate", "copy_ragged", "shuffle_in_tail", "shuffle_with_ballot",
         "pipeline", "multiply")  # fmt: skip


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(variant, name):
    for seed in SEEDS:
        for late in LANDINGS:
            for n in (RAGGED, 64):
                out, counters = run(variant, name, n=n, seed=seed, late_copies=late)
                assert is_right(name, out, n), (seed, late, n)
                assert counters["bank_conflicts"] == 0


# (fault, layer, what the layer reports). "values" means wrong results in every order of the threads.
FOUND = [
    ("exchange_in_warp: no __syncwarp", "race", "undefined"),
    ("exchange_in_warp: no __syncwarp", "race", "race"),
    ("exchange_in_warp: no __syncwarp", "values", None),
    ("reverse_in_block: no barrier after the write", "race", "race"),
    ("reverse_in_block: no barrier after the write", "values", None),
    # Here most orders of the threads give right values by chance, so that only the race build always finds the fault.
    ("reverse_in_block: no barrier before the next write", "race", "race"),
    ("accumulate: not atomic", "race", "cross_block_race"),
    ("overrun_shared", "race", "out_of_bounds"),
    ("overrun_shared", "sanitized", "use-after-poison"),
    ("read_unwritten: dynamic", "race", "undefined"),
    ("read_unwritten: static", "race", "undefined"),
    ("copy_ragged: no guard", "race", "out_of_bounds"),
    ("copy_ragged: no guard", "sanitized", "heap-buffer-overflow"),
    ("misaligned_vector: wrapper", "fast", "misaligned"),
    ("misaligned_vector: wrapper", "race", "misaligned"),
    ("misaligned_vector: plain", "sanitized", "misaligned address"),
    ("local_memory_of_another_thread", "race", "out_of_bounds"),
    ("conditional_barrier", "fast", "barrier"),
    ("exit_before_barrier", "fast", "barrier"),
    ("shuffle_in_tail: inside the guard", "fast", "deadlock"),
    ("caller_not_in_mask", "fast", "divergence"),
    ("source_not_in_mask", "fast", "divergence"),
    ("pipeline: waits for too little", "fast", "async_copy"),
    ("pipeline: waits for too little", "race", "in_flight"),
    ("pipeline: no barrier after the wait", "race", "race"),
    ("pipeline: no barrier before the next copy", "race", "race"),
    ("pipeline: copies past the end", "race", "out_of_bounds"),
    ("pipeline: copies past the end", "sanitized", "heap-buffer-overflow"),
    ("never_waited", "fast", "async_copy"),
    ("multiply: no swizzle", "conflicts", None),
    ("multiply: reads without the swizzle", "values", None),
    ("multiply: fragment registers swapped", "values", None),
    ("multiply: not transposed", "values", None),
    ("multiply: rows not aligned", "fast", "misaligned"),
    ("launch: half a warp", "fast", "launch"),
    ("launch: not in the current stream", "fast", "launch"),
]


@pytest.mark.parametrize("name, layer, said", [case for case in FOUND if case[1] != "sanitized"])
def test_faults_are_caught(name, layer, said):
    for seed in SEEDS:
        for late in LANDINGS if layer != "values" else (True,):
            if layer in ("values", "conflicts"):
                out, counters = run("fast", name, seed=seed, late_copies=late)
                assert is_right(name, out, RAGGED) == (layer == "conflicts")
                assert layer != "conflicts" or counters["bank_conflicts"] > 0
                continue
            with pytest.raises(EmulationError) as caught:
                run(layer, name, seed=seed, late_copies=late)
            assert said in {report.kind for report in caught.value.reports}


SANITIZED = [(name, said) for name, layer, said in FOUND if layer == "sanitized"]


@pytest.fixture(scope="module")
def sanitized_answers():
    """(exit status, printed text) of each fault and of each right kernel, all run in forks of one sanitized process."""
    load_time = build.build("sanitized", SOURCES)
    names = [name for name, _ in SANITIZED] + list(RIGHT)
    answer = run_sanitized(f"""
        import json, os, tempfile
        import torch
        from tests.emulation import test_cuda_emulation as tests
        torch.set_num_threads(1)
        tests.kernel("sanitized")
        answers = {{}}
        for name in {names!r}:
            with tempfile.TemporaryFile() as file:
                child = os.fork()
                if child == 0:
                    os.dup2(file.fileno(), 2)
                    out, _ = tests.run("sanitized", name)
                    os._exit(0 if tests.is_right(name, out, tests.RAGGED) else 2)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                file.seek(0)
                answers[name] = status, file.read().decode(errors="replace")
        print(json.dumps(answers))
    """)
    assert answer.returncode == 0, f"{load_time}: {answer.stderr[-3000:]}"
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.parametrize("name, said", SANITIZED)
def test_sanitizers_catch_faults(sanitized_answers, name, said):
    status, text = sanitized_answers[name]
    assert status == 1 and said in text and "micro.cu:" in text


def test_sanitizers_pass_right_kernels(sanitized_answers):
    for name in RIGHT:
        assert sanitized_answers[name][0] == 0, sanitized_answers[name]


def test_each_seed_gives_another_order_and_repeats_it():
    name = "reverse_in_block: no barrier before the next write"
    outcomes = {run("fast", name, seed=seed)[0].numpy().tobytes() for seed in range(8)}
    assert len(outcomes) > 2
    assert torch.equal(*(run("fast", name, seed=5)[0] for _ in range(2)))


def test_late_copies_show_a_stage_overwritten_too_early():
    # A copy that lands at once leaves right values, so that only late copies show the fault in the fast build. The race
    # build always reports it, see FOUND.
    name = "pipeline: no barrier before the next copy"
    assert not is_right(name, run("fast", name, seed=1, late_copies=True)[0], RAGGED)


def test_a_tail_of_whole_warps_hides_its_fault():
    # For this reason every test of a kernel includes lengths that are not multiples of 32.
    name = "shuffle_in_tail: inside the guard"
    assert is_right(name, run("race", name, n=32)[0], 32)


def test_the_report_of_a_race_names_both_threads_and_the_line():
    with pytest.raises(EmulationError) as caught:
        run("race", "reverse_in_block: no barrier before the next write", seed=0)
    report = next(report for report in caught.value.reports if report.kind == "race")
    assert report.thread != report.other_thread >= 0 and report.count > 1
    assert "dynamic shared memory" in report.message
    if shutil.which("addr2line"):
        line = int(report.where.removeprefix("micro.cu:"))
        assert "s[" in SOURCES[0].read_text().splitlines()[line - 1]
        assert report.kernel == "reverse_in_block<true, false>"
    assert report.where in str(caught.value)


def test_an_access_out_of_bounds_names_the_buffer():
    with pytest.raises(EmulationError, match=rf"read of 4 bytes at byte {4 * RAGGED} of source \({4 * RAGGED} bytes\)"):
        run("race", "copy_ragged: no guard")


def test_shared_memory_must_be_asked_for():
    with pytest.raises(RuntimeError, match="error 1"):  # cudaErrorInvalidValue, as the driver says
        run("fast", "launch: more shared memory than asked for")


def test_counters():
    _, counters = run("race", "multiply")
    assert counters["launches"] == counters["blocks"] == 1
    assert counters["mma"] == 32 and counters["ldmatrix"] == 20 and counters["async_copies"] == 640
    assert counters["switches"] > 0 and counters["accesses"] > 0


def test_every_fault_of_micro_is_in_the_table():
    import re

    planted = set(re.findall(r'\{"([^"]+: [^"]+)",', SOURCES[0].read_text()))
    planted |= set(re.findall(r"^ +ENTRY\((\w+),", SOURCES[0].read_text(), re.M)) - set(RIGHT)
    assert planted - {"launch: more shared memory than asked for"} == {name for name, _, _ in FOUND}


def test_a_compile_error_is_shown(tmp_path):
    (tmp_path / "broken.cu").write_text("nonsense;\n")
    with pytest.raises(RuntimeError, match="nonsense"):
        build.build("fast", [tmp_path / "broken.cu"])


def test_modules_with_the_same_operators_are_kept_apart():
    source = native_build.CSRC / "cuda" / "nearest_code.cu"
    modules = [load("fast", [source]), load("fast", [source, *SOURCES])]
    assert load("fast", [source]) is modules[0] and modules[0].namespace != modules[1].namespace
    z, codebook = randn(3, 4, seed=1), randn(5, 4, seed=2)
    for called, other in (modules, modules[::-1]):
        with called.run() as record, other.run() as nothing:
            called.ops._nearest_code(z, codebook, False)
        assert record.counters["launches"] > 0 and nothing.counters["launches"] == 0


def test_what_files_share_is_compiled_once(monkeypatch, tmp_path):
    """A file, and the runtime, serve every module of a variant that contains them."""
    load("fast", SOURCES), load("race", SOURCES)
    new = tmp_path / "new.cu"
    new.write_text(f"// {uuid.uuid4()}: no earlier run has compiled it\n")
    made = []

    def make(command, output):
        if not output.is_file():
            made.append(output.name)
        return output

    monkeypatch.setattr(build, "_make", make)
    for variant in ("fast", "race"):
        made.clear()
        build.build(variant, [*SOURCES, new])
        assert [name.partition("-")[0] for name in made] == ["new", f"{build.MODULE}.so"]
