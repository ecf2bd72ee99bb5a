"""The PTX interpreter on code that Triton's compiler wrote for sm_80.

Real GPUs run what Triton compiles. Its ldmatrix, mma and cp.async give right results only if the interpreter's layouts
agree with those of the hardware, so that these tests check the layouts against an independent source.
"""

import functools
import re

import pytest
import torch

from tools.gpu_emulation.ptx import Memory, PtxError, parse, run
from var_kernels.testing import assert_accurate, randn, stated_order

pytest.importorskip("triton")

from tests.helpers import ptx_kernels  # noqa: E402
from var_kernels.triton.launch import Launch  # noqa: E402
from var_kernels.triton.offline import compile_for  # noqa: E402
from var_kernels.triton.targets import TARGETS  # noqa: E402

LOG2_E = 1.4426950408889634


def execute(kernel, grid, arguments: dict, outputs: tuple[str, ...], updated=(), change=lambda text: text):
    """Runs a kernel, whose PTX `change` may edit, and returns what was executed.

    It may write `outputs`, which begin undefined, and `updated`, which begin with values. All other tensors are
    read-only.
    """
    compiled = compile_for(Launch(kernel, grid, arguments, num_warps=4, num_stages=3), TARGETS["sm_80"])
    (decoded,) = parse(change(compiled.asm["ptx"])).kernels.values()
    memory, values = Memory(), []
    for name, kind in compiled.src.signature.items():
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            array = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()
            memory.add(name, array, writable=name in (*outputs, *updated), defined=name not in outputs)
            values.append(value.data_ptr())
        elif kind != "constexpr":
            values.append(value)
    values += [0] * (len(decoded.parameters) - len(values))  # Triton's scratch memory, which these kernels do not use
    options = {"threads": (32 * compiled.metadata.num_warps, 1, 1), "shared_bytes": compiled.metadata.shared}
    return run(decoded, values, grid=grid + (1,) * (3 - len(grid)), memory=memory, **options)


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element behind an aligned address: no vector load and no cp.async can read them."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)


def attend(dtype, length: int, precision: str = "ieee", place=lambda tensor: tensor, change=lambda text: text):
    """Runs the attention kernel and compares with torch; returns what was executed."""
    block = 64 if dtype != torch.float32 else 32
    q, k, v = (place(randn(2, length, block, seed=seed, dtype=dtype)) for seed in range(3))
    out = place(torch.empty_like(q))
    arguments = dict(q_ptr=q, k_ptr=k, v_ptr=v, o_ptr=out, scale=LOG2_E / block**0.5, length=length)
    arguments |= dict(BM=block, BN=32, D=block, PRECISION=precision)
    stats = execute(ptx_kernels.attention, (-(-length // block), 2), arguments, ("o_ptr",), change=change)
    plain = torch.nn.functional.scaled_dot_product_attention
    with stated_order():
        same = plain(q, k, v)
    assert_accurate(out, same, plain(q.double(), k.double(), v.double()))
    return stats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision(dtype):
    opcodes = attend(dtype, 100).opcodes
    kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    expected = [f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32", "cp.async.cg.shared.global"]
    expected += ["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "ldmatrix.sync.aligned.m8n8.x4.shared.b16"]
    assert not set(expected) - set(opcodes)


def test_attention_from_unaligned_addresses():
    opcodes = attend(torch.bfloat16, 70, place=unaligned).opcodes
    assert "cp.async.cg.shared.global" not in opcodes and opcodes["ld.global.b16"]


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_attention_in_single_precision(precision):
    opcodes = attend(torch.float32, 50, precision).opcodes
    assert ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" in opcodes) == (precision == "tf32x3")


def test_many_blocks_of_attention():
    stats = attend(torch.bfloat16, 680)
    assert stats.instructions > 100_000


# Each fault is planted in the PTX that Triton writes: (pattern, replacement, message).
FAULTS = {
    "wait for one group less": (r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;", "while a cp.async"),
    "no barrier after the wait": (r"(cp\.async\.wait_group\s+2;\s*)bar\.sync\s+0;", r"\1", "race in shared memory"),
    "no barriers": (r"bar\.sync\s+0;", "", "race in shared memory"),
    "a transposed load lost": (r"x4\.trans\.shared", "x4.shared", "not accurate"),
    "a load without its mask": (r"@%p\d+ (ld\.global\.v4)", r"\1", "out of bounds"),
    "a store without its mask": (r"@%p\d+ (st\.global\.v4)", r"\1", "out of bounds"),
    "a smaller product": (r"m16n8k16\.row", "m16n8k8.row", "expected a vector of 2 elements, got 4"),
    "an unknown modifier": (r"cp\.async\.cg\.", "cp.async.cb.", "expected one of the modifiers"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faults_in_attention_are_found(name):
    pattern, replacement, message = FAULTS[name]

    def change(text: str) -> str:
        changed, count = re.subn(pattern, replacement, text)
        assert count, "the pattern no longer occurs in what Triton writes"
        return changed

    if message == "not accurate":
        with pytest.raises(AssertionError, match="expected"):
            attend(torch.bfloat16, 100, change=change)
    else:
        with pytest.raises(PtxError, match=message):
            attend(torch.bfloat16, 100, change=change)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layer_norm(dtype):
    rows, width = 7, 1000
    x = randn(rows, width, seed=0, dtype=dtype)
    y = torch.empty_like(x)
    arguments = dict(x_ptr=x, y_ptr=y, rows=rows, width=width, eps=1e-6, BLOCK=1024)
    opcodes = execute(ptx_kernels.layer_norm, (3,), arguments, ("y_ptr",)).opcodes
    normalise = functools.partial(torch.nn.functional.layer_norm, normalized_shape=(width,), eps=1e-6)
    assert_accurate(y, normalise(x), normalise(x.double()))
    assert opcodes["shfl.sync.bfly.b32"] and opcodes["createpolicy.fractional.L2::evict_first.b64"]


@pytest.mark.parametrize("dropped", [0, 1, 2, 3])
def test_each_barrier_of_layer_norm_is_needed(dropped):
    """There are two reductions of two barriers each. Without one of them, only the check for races finds an error."""

    def change(text: str) -> str:
        barriers = list(re.finditer(r"bar\.sync\s+0;", text))
        assert len(barriers) > dropped
        return text[: barriers[dropped].start()] + text[barriers[dropped].end() :]

    x = randn(7, 1000, seed=0)
    arguments = dict(x_ptr=x, y_ptr=torch.empty_like(x), rows=7, width=1000, eps=1e-6, BLOCK=1024)
    with pytest.raises(PtxError, match="race in shared memory"):
        execute(ptx_kernels.layer_norm, (3,), arguments, ("y_ptr",), change=change)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_nearest_code(precision):
    z, codes = randn(70, 16, seed=0), randn(100, 16, seed=1)
    codes[60:] = codes[:40]  # ties between tiles and within one
    index = torch.empty(70, dtype=torch.int64)
    arguments = dict(z_ptr=z, codes_ptr=codes, index_ptr=index, count=70, size=100, C=16, BM=32, BV=32)
    execute(ptx_kernels.nearest, (3,), arguments | dict(PRECISION=precision), ("index_ptr",))
    assert torch.equal(index, torch.cdist(z.double(), codes[:60].double()).argmin(1))


def test_gather_functions_and_atomics():
    count, size = 200, 60
    x, index = randn(size, seed=0), torch.randint(-size, size, (count,), generator=torch.Generator().manual_seed(0))
    y, sums = torch.empty(count), torch.zeros(16)
    arguments = dict(x_ptr=x, index_ptr=index, y_ptr=y, sums_ptr=sums, count=count, size=size, BLOCK=128)
    opcodes = execute(ptx_kernels.gather, (2,), arguments, ("y_ptr",), updated=("sums_ptr",)).opcodes

    def expected(values: torch.Tensor) -> torch.Tensor:
        steps = values.exp() + (values.abs() + 1).log() + values.sin() + values.erf() + values.floor()
        # The argument of the cosine is rounded to float32 by the kernel, and large: sin and cos reduce it exactly.
        steps = steps + (values.float() * 100000).to(values.dtype).cos()
        i = torch.arange(count)
        return steps / 3 + i // 7 + i % 5

    assert_accurate(y, expected(x[index]), expected(x.double()[index]))
    exact = torch.zeros(16, dtype=torch.float64).index_add(0, torch.arange(count) % 16, x.double()[index])
    assert_accurate(sums, exact.float(), exact)
    assert opcodes["atom.global.gpu.acq_rel.add.f32"] and opcodes["ld.global.b64"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_arithmetic(dtype):
    """x + x * x is one fused operation: rounded once."""
    count = 200
    x = randn(count, seed=0, dtype=dtype)
    fused = (x.double() + x.double() ** 2).to(dtype)
    y, results = torch.empty_like(x), [torch.empty(256) for _ in range(2)]
    arg = torch.empty(1, dtype=torch.int32)
    arguments = dict(x_ptr=x, y_ptr=y, sorted_ptr=results[0], running_ptr=results[1], arg_ptr=arg, count=count)
    execute(ptx_kernels.narrow, (1,), arguments | dict(BLOCK=256), ("y_ptr", "sorted_ptr", "running_ptr", "arg_ptr"))
    padded = torch.nn.functional.pad(fused.float(), (0, 56))
    assert torch.equal(y, torch.maximum(fused, x))
    assert torch.equal(results[0], padded.sort().values)
    assert_accurate(results[1], padded.cumsum(0), padded.double().cumsum(0))
    assert arg.item() == padded.argmin().item()
