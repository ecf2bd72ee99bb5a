"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at every instruction set of this machine.

They do not see what the tile instructions of AMX read and write, because these are assembler. ThreadSanitizer is not
used: torch's OpenMP runtime is not compiled with it, so that it does not know the barriers and reports every result
that one thread writes and another reads. It would have little to check: tasks share only an atomic counter, and the
tests of each op compare the bits of results for several numbers of threads.
"""

import platform

import pytest

from tools.gpu_emulation.cuda.sanitized import CHECKED_BY_CALLS, run_sanitized
from var_kernels.native import build
from var_kernels.testing import isa_levels

FLAGS = "-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"

# Lengths, channels and codes straddle vectors, tiles and blocks. Views are strided. Forward and backward run.
GRID = """
from pathlib import Path
import torch
import var_kernels as vk
from var_kernels.native import build, load
from var_kernels.inference.group_norm_silu import group_norm_silu
from var_kernels.testing import randn
from var_kernels.inference.packed_linear import PackedLinear
from var_kernels.inference.winograd_conv import PackedConv3x3
from tests.kernels.multi_scale_quantize.contract import SHAPES, gradients, inputs, leaves

build.AHEAD_OF_TIME_LIBRARY = Path(BUILT)
assert load.native_library().path == Path(BUILT) and load.native_library().isa == LEVEL
torch.set_num_threads(2)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for lens, queries, dim in (((1, 4, 9, 16, 25, 36), 91, 64), ((1, 2, 70), 73, 8), ((3, 130), 5, 126),
                               ((65,), 17, 72), ((1, 1, 1), 3, 40), ((2, 300), 1, 136)):
        length = sum(lens)
        q, k, v = randn(2, length, 3, 4, dim, seed=1, dtype=dtype).permute(2, 0, 3, 1, 4)
        q, k, v = (t.requires_grad_() for t in (q[:, :, -queries:], k[:, :2], v[:, :2]))
        out, lse = vk.block_causal_attention(q, k, v, lens, return_lse=True)
        torch.autograd.grad((out.float().sum() + lse.sum()), (q, k, v))
        exact = vk.block_causal_attention(q.double(), k.double(), v.double(), lens)
        assert (out - exact).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
    for batch, length, channels in ((2, 5, 33), (1, 49, 64), (2, 1, 1), (3, 50, 130)):
        x, branch = (randn(batch, length, channels, seed=s, dtype=dtype).requires_grad_() for s in (1, 2))
        rows = randn(batch, 6, channels, seed=3, dtype=dtype).requires_grad_()
        gate, scale, shift = rows[:, 1:2], rows[:, 2:3], randn(batch, length, channels, seed=4, dtype=dtype)
        residual, y = vk.gated_residual_adaln(x, branch, gate, scale, shift)
        wide = [tensor.detach().float() for tensor in (x, gate, scale, shift)]
        vk.gated_residual_adaln(wide[0], branch.detach(), *wide[1:])
        torch.autograd.grad((residual + y).float().sum(), (x, branch, rows))
        torch.autograd.grad(vk.adaln_layer_norm(x, scale, shift).float().sum(), (x, rows))
    for rows, codes, channels in ((1, 1, 1), (7, 65, 32), (100, 130, 9), (13, 33, 70)):
        for metric in ("l2", "cosine"):
            vk.nearest_code(randn(rows, channels, seed=1, dtype=dtype), randn(codes, channels, seed=2, dtype=dtype),
                            metric=metric)
torch.set_grad_enabled(False)
for dtype in (torch.float32, torch.bfloat16):
    for batch, length, heads, dim in ((2, 3, 2, 7), (1, 40, 3, 126)):
        caches = [torch.zeros(batch, heads, length + 2, dim, dtype=dtype) for _ in range(2)]
        vk.qk_norm_cache(randn(batch, length, 3, heads, dim, seed=1, dtype=dtype), *caches, 2)
    for batch, channels, side in ((2, 33, 5), (1, 64, 20)):
        x = randn(batch, channels, side, side + 3, seed=1, dtype=dtype)
        group_norm_silu(x, torch.ones(channels), torch.zeros(channels), 1)
        for out_channels, doubling in ((17, False), (100, False), (40, True)):
            weight = randn(out_channels, channels, 3, 3, seed=2)
            conv = PackedConv3x3(weight, torch.zeros(out_channels), dtype=dtype, doubling=doubling)
            y = conv(x)
            assert torch.equal(conv(x, torch.zeros_like(y)), y)
    for rows, inner, outer in ((1, 2, 1), (7, 34, 65), (250, 40, 130), (9, 2050, 33)):
        x, weight = randn(rows, inner, seed=1, dtype=dtype), randn(outer, inner, seed=2, dtype=dtype)
        PackedLinear(weight, torch.zeros(outer), gelu=True)(x)
for rows, vocab in ((3, 65), (20, 1000)):
    logits = [3 * randn(1, rows, vocab, seed=seed) for seed in (1, 2)]
    vk.sample_tokens(*logits, guidance=1.5, top_k=40, top_p=0.9, seeds=torch.tensor([5]))
torch.set_grad_enabled(True)
for name in ("just over a vector", "wide", "nine images"):
    tensors = leaves(inputs(SHAPES[name]))
    gradients(vk.multi_scale_quantize(*tensors, SHAPES[name][-1]), tensors)
print("silent")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The instrumented library. Only processes that preload the runtimes of the sanitizers can load it."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip("the runtimes of the sanitizers are preloaded in the way of Linux on x86-64")
    directory = tmp_path_factory.mktemp("sanitized")
    path = directory / build.LIBRARY_NAME
    by_calls = build.find_compiler().family == "g++"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", f"{FLAGS} {CHECKED_BY_CALLS}" if by_calls else FLAGS)
        build.build(path, directory / "objects", mode="cpu", torch=build.require_torch(build.find_torch()))
    check = b"__asan_load" if by_calls else b"__asan_report_load"
    assert check in path.read_bytes() and b"__ubsan_handle" in path.read_bytes()
    return path


@pytest.mark.evidence  # it compiles every instruction set once more
@pytest.mark.parametrize("level", isa_levels())
def test_cpu_kernels_are_silent(library, monkeypatch, level):
    monkeypatch.setenv("VAR_KERNELS_ISA", level)
    code = GRID.replace("LEVEL", repr(level)).replace("BUILT", repr(str(library)))
    answer = run_sanitized(code, timeout=500)
    assert answer.returncode == 0 and answer.stdout.strip() == "silent", answer.stdout[-2000:] + answer.stderr[-6000:]
