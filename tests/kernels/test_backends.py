"""Which backend serves which op: the order of "auto", reasons, and the file of measured speeds. GPUs are stand-ins."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import var_kernels
from var_kernels import backends
from var_kernels.measured import speeds
from var_kernels.measured.speeds import Speeds
from var_kernels.native import build, library
from var_kernels.native import load as native_load

NAME = "Stand-in GPU 9000 (X)"


class StandIn:
    """Makes torch and the loader report a GPU, and a library for it, that do not exist."""

    def __init__(self, monkeypatch):
        self.capability, self.toolkit, self.driver, self.native_reason = (8, 0), "13.0", 13, None
        self.kernels = lambda op: True
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: NAME)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: self.capability)
        monkeypatch.setattr(backends, "_driver_cuda", lambda: self.driver)
        monkeypatch.setattr(
            torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: key == "CUDA" and self.kernels(op)
        )
        monkeypatch.setattr(native_load, "native_library", self.load)
        monkeypatch.setattr(backends, "_triton_reason", lambda: None)

    def load(self):
        if self.native_reason is not None:
            return native_load.NativeStatus(False, self.native_reason)
        return native_load.NativeStatus(True, build_info={"cuda": self.toolkit})


def forget():
    for function in (backends._found_cuda_reason, backends.gpu_choice, speeds.present):
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("VAR_KERNELS_CACHE", str(tmp_path))
    forget()
    yield StandIn(monkeypatch)
    forget()


def auto(op: str, dtype: torch.dtype = torch.bfloat16) -> str:
    forget()
    return backends.resolve(op, "auto", "cuda", dtype)


def refusal(op: str, device: str = "cuda") -> str:
    forget()
    with pytest.raises(ValueError, match=f"'cuda' cannot serve {op} on {device}") as error:
        backends.resolve(op, "cuda", device, torch.float32)
    return str(error.value)


def test_the_table_of_ops_agrees_with_the_files_of_kernels():
    """The table lists for each backend exactly the ops of which it has files."""
    package = Path(backends.__file__).parent
    files = {"reference": (package / "reference", ".py"), "triton": (package / "triton", ".py"),
             "cpu": (build.CSRC / "cpu", ".cpp"), "cuda": (build.CSRC / "cuda", ".cu")}  # fmt: skip
    assert set(backends.SERVES) == set(backends.BACKENDS) == set(files)
    for name, (folder, suffix) in files.items():
        there = {op for op in backends.OPS if (folder / f"{backends.page_of(op)}{suffix}").is_file()}
        assert set(backends.SERVES[name]) == there, name
    for backend in backends.GPU_BACKENDS:
        assert tuple(backends.SERVES[backend]) == backends.GPU_OPS


@pytest.mark.parametrize("op", sorted(set(backends.OPS) - set(backends.GPU_OPS)))
def test_an_op_without_gpu_kernels_is_served_by_the_reference_on_a_gpu(gpu, op):
    assert auto(op, torch.float32) == auto(op) == "reference"
    for name in backends.GPU_BACKENDS:
        with pytest.raises(ValueError, match=f"'{name}' cannot serve {op} .*: it has no kernel for this op; expected "
                                             "one of auto, reference$"):  # fmt: skip
            backends.resolve(op, name, "cuda", torch.float32)
        assert backends.for_op(op, name) == "reference" and backends.for_op("nearest_code", name) == name
    for name in ("auto", "cpu", "reference", "unknown"):
        assert backends.for_op(op, name) == name


def test_an_op_without_a_triton_kernel_is_refused_or_served_by_the_reference(gpu, monkeypatch):
    others = {op: dtypes for op, dtypes in backends.SERVES["triton"].items() if op != "nearest_code"}
    monkeypatch.setitem(backends.SERVES, "triton", others)
    gpu.native_reason = "no compiler"
    assert auto("nearest_code") == "reference" and auto("adaln_layer_norm") == "triton"
    with pytest.raises(ValueError, match="'triton' cannot serve nearest_code .*: it has no kernel for this op"):
        backends.resolve("nearest_code", "triton", "cuda", torch.float32)


@pytest.mark.parametrize("op", backends.GPU_OPS)
def test_the_shipped_order(gpu, op):
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (13, 0)):
        gpu.capability = capability
        beyond_mma = op == "block_causal_attention" and capability[0] in (9, 10, 11)
        assert auto(op) == ("triton" if beyond_mma else "cuda")
        assert backends.gpu_choice(op) in backends.GPU_ORDER[op] and backends.gpu_choice(op).why
        assert backends.auto_order(op, "cuda")[1:] == tuple(
            name for name in backends.BACKENDS if name != backends.auto_order(op, "cuda")[0]
        )
        assert backends.auto_order(op, "cpu") == backends.BACKENDS
    assert auto(op, torch.float64) == "reference"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"capability": (7, 5)}, "its kernels need a GPU of compute capability 8.0 or newer"),
        ({"native_reason": "no compiler"}, "the native library is not available: no compiler"),
        ({"toolkit": None}, "install the CUDA toolkit (nvcc), then python -m var_kernels.native.build --mode cuda"),
        ({"driver": 12}, "the native library was built with CUDA 13.0, which a driver for CUDA 12 cannot run"),
    ],
)
def test_why_cuda_does_not_serve(gpu, changes, reason):
    for name, value in changes.items():
        setattr(gpu, name, value)
    for op in backends.GPU_OPS:
        message = refusal(op)
        assert reason in message and message.endswith("expected one of auto, triton, reference")
        assert auto(op) == "triton"


def test_an_op_is_served_if_all_its_raw_ops_are_there(gpu):
    gpu.kernels = lambda op: op not in ("var_kernels::_next_scale_input", "var_kernels::_gated_residual_adaln_backward")
    assert "the native library has no CUDA kernel for _next_scale_input; " in refusal("multi_scale_quantize")
    for op in ("adaln_layer_norm", "gated_residual_adaln"):  # both ops are in one module
        assert "has no CUDA kernel for _gated_residual_adaln_backward; " in refusal(op)
    assert auto("multi_scale_quantize") == "triton" and auto("nearest_code") == "cuda"


def test_every_op_has_a_module_and_an_order():
    pages = {backends.page_of(op) for op in backends.OPS}
    assert pages == set(library._names)
    assert [name for stem in library._names for name in library.names(stem)] == [
        schema.partition("(")[0] for schema in library._schemas
    ]
    assert set(backends.GPU_ORDER) == set(backends.GPU_OPS)
    for choices in backends.GPU_ORDER.values():
        assert not choices[-1].majors and {choice.first for choice in choices} <= set(backends.GPU_BACKENDS)


def test_amd_gpus_are_not_served(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "for NVIDIA GPUs, and this torch is a build for AMD's" in refusal("nearest_code")
    assert {auto(op) for op in backends.GPU_OPS} == {"triton"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    forget()
    assert "there is no GPU; expected one of auto, reference" in refusal("nearest_code")
    assert "runs on cuda tensors only" in refusal("nearest_code", "cpu")
    assert auto("nearest_code") == "reference"


def test_the_order_is_a_constant_of_compiled_code(monkeypatch):
    forget()
    with monkeypatch.context() as patches:  # outside of this block, because the compiler itself would use the GPU
        StandIn(patches)
        expected = [backends.resolve(op, "auto", "cuda", torch.float32) for op in backends.OPS]
    assert expected == ["cuda" if op in backends.GPU_OPS else "reference" for op in backends.OPS]

    def function(x):
        return x + 1, [backends.resolve(op, "auto", "cuda", torch.float32) for op in backends.OPS]

    assert torch.compile(function, fullgraph=True, backend="eager")(torch.ones(2))[1] == expected
    forget()


def test_auto_runs_the_cuda_kernels(monkeypatch):
    """With fake CUDA tensors, which have a device but no memory, the public functions call the library's operators."""
    forget()
    with monkeypatch.context() as patches:  # not for fake tensors, which ask a GPU for more than the stand-in has
        StandIn(patches)
        assert {backends.resolve(op, "auto", "cuda", torch.float32) for op in backends.GPU_OPS} == {"cuda"}
    called = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.name())
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), Recorded():
        q, x, scale, z, f, codes, weight, bias, qkv, cache = (
            torch.empty(shape, device="cuda")
            for shape in (
                (1, 2, 5, 16), (2, 7, 8), (2, 8), (6, 8), (2, 8, 2, 2), (2, 1, 8), (1, 8, 8, 3, 3), (1, 8),
                (2, 3, 3, 2, 8), (2, 2, 9, 8),
            )  # fmt: skip
        )
        results = [
            var_kernels.block_causal_attention(q, q, q, (1, 4)),
            var_kernels.adaln_layer_norm(x, scale, scale),
            *var_kernels.gated_residual_adaln(x, x, scale, scale, scale),
            var_kernels.nearest_code(x, z),
            *var_kernels.multi_scale_quantize(f, z, weight, bias, (1, 2)),
            *var_kernels.next_scale_input(f, codes, weight, bias, (1, 2), 0),
            var_kernels.qk_norm_cache(qkv, cache, cache.clone(), 0),
            var_kernels.sample_tokens(x, seeds=torch.zeros(2, dtype=torch.int64, device="cuda")),
        ]
    assert {result.device.type for result in results} == {"cuda"}
    raw = {f"var_kernels::{name}" for op in backends.GPU_OPS for name in library.names(backends.page_of(op))}
    assert {name for name in called if name.startswith("var_kernels")} == {
        name for name in raw if not name.endswith("_backward")  # autograd needs a real device
    }
    forget()


# ---- what was measured -----------------------------------------------------------------------------------------------


def test_the_faster_backend_comes_first_beyond_the_margin(gpu):
    results = {
        "nearest_code": Speeds({"cuda": 2.0, "triton": 2.2}, 4),
        "adaln_layer_norm": Speeds({"cuda": 2.0, "triton": 2.08}, 4),
        "gated_residual_adaln": Speeds({"cuda": 2.0, "triton": 1.0}, 4),
    }
    path = speeds.write(NAME, results)
    assert path == speeds.path_of(NAME) and path.name == "backends-stand-in-gpu-9000-x.json"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert [auto(op) for op in (*results, "multi_scale_quantize")] == ["triton", "cuda", "cuda", "cuda"]
    assert backends.gpu_choice("nearest_code").why == "measured on this kind of GPU: cuda 2×, triton 2.2× (4 cases)"
    gpu.capability = (9, 0)
    speeds.write(NAME, {"block_causal_attention": Speeds({"cuda": 1.2, "triton": 1.0}, 1)})
    assert auto("block_causal_attention") == "cuda" and auto("nearest_code") == "cuda"
    path.unlink()
    assert auto("block_causal_attention") == "triton"


@pytest.mark.parametrize("name", ["sources", "torch", "triton"])
def test_measurements_of_other_kernels_do_not_count(gpu, name):
    path = speeds.write(NAME, {"nearest_code": Speeds({"cuda": 1.0, "triton": 2.0}, 4)})
    assert auto("nearest_code") == "triton"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: "another"}))
    assert auto("nearest_code") == "cuda"


def _entry(**changes) -> str:
    entry = {"speeds": {"cuda": 1.0, "triton": 2.0}, "cases": 4}
    return json.dumps({**speeds.present(), "ops": {"nearest_code": {**entry, **changes}}})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"ops": []}', '{"ops": {}}', _entry(speeds={}), _entry(speeds={"cuda": 1.0}),
        _entry(speeds={"cuda": 1.0, "cpu": 1.0}), _entry(speeds={"cuda": 0.0, "triton": 1.0}),
        _entry(speeds={"cuda": float("nan"), "triton": 1.0}), _entry(speeds={"cuda": "1", "triton": 1.0}),
        _entry(cases="many"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(gpu, text):
    speeds.path_of(NAME).write_text(text)
    with pytest.raises(ValueError, match="backends-stand-in-gpu-9000-x.json: expected what .* writes, got"):
        auto("nearest_code")
    speeds.path_of(NAME).write_text(_entry())
    assert auto("nearest_code") == "triton"


def test_the_report_says_which_backend_and_why(gpu, monkeypatch, capsys):
    from var_kernels import __main__

    gpu.capability = (9, 0)
    speeds.write(NAME, {"nearest_code": Speeds({"cuda": 1.0, "triton": 2.0}, 4)})
    console = __main__.Console(highlight=False, width=200)
    __main__._print_backends(console)
    __main__._print_gpu_order(console)
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("nearest_code")]
    assert row.split() == ["nearest_code", "cpu", "triton"]
    assert "tries triton first for nearest_code: measured on this kind of GPU: cuda 1×, triton 2× (4 cases)" in printed
    assert "tries triton first for block_causal_attention on compute capability 9, 10, 11: compiled to wgmma" in printed
    assert str(speeds.path_of(NAME)) in printed


def test_the_report_names_a_damaged_file(gpu, monkeypatch, capsys):
    from var_kernels import __main__

    speeds.path_of(NAME).write_text("{")
    monkeypatch.setattr(__main__, "_print_installation", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["var_kernels"])
    assert __main__.main() == 1
    assert "backends-stand-in-gpu-9000-x.json: expected what" in capsys.readouterr().err
