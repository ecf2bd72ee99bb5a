"""The CUDA kernel of sample_tokens: emulated, compiled, with planted faults (on a CPU)."""

import functools

import pytest
import torch

from tests.helpers.cuda_emulation import EmulatedKernels
from tests.kernels.sample_tokens.contract import (
    OPTIONS,
    assert_top_p_uses_its_budget,
    logits_with_special_values,
    noise_for_each_token,
    noise_of,
    tied_logits,
)
from tools.gpu_emulation.cuda import build, nvcc
from tools.gpu_emulation.cuda.mutants import Mutant, assert_found, assert_nothing_found, parameters
from tools.report import machine_code
from var_kernels import sample_tokens
from var_kernels.native import build as native_build
from var_kernels.reference.sample_tokens import restrict
from var_kernels.testing import randn

if build.unavailable_reason() is not None:
    pytest.skip(build.unavailable_reason(), allow_module_level=True)

SOURCE = native_build.CSRC / "cuda" / "sample_tokens.cu"
KERNELS = EmulatedKernels(SOURCE)
emulated, emulation = KERNELS.load, KERNELS.serving


def check(conditional, unconditional=None, variant="fast", executor=None, seed=0, **options):
    """The tokens of the kernel are those of the reference."""
    settings = {"executor": executor} if executor else {"seed": seed}
    with emulation(variant, **settings):
        found = sample_tokens(conditional, unconditional, **options, backend="cuda")
    assert torch.equal(found, sample_tokens(conditional, unconditional, **options, backend="reference")), options


@pytest.mark.parametrize("variant", ["fast", "race"])
@pytest.mark.parametrize("vocab", [1, 17, 64, 1000, 1025])
def test_draws_what_the_reference_draws(vocab, variant):
    conditional, unconditional = (4 * randn(1, 2, vocab, seed=seed) for seed in (vocab, vocab + 1))
    for seed, (top_k, top_p) in enumerate(OPTIONS):
        options = {"guidance": 1.2 * (seed % 2), "top_k": top_k, "top_p": top_p}
        check(conditional, unconditional, variant, seed=seed, noise=noise_of(conditional.shape, seed), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_seeds_and_large_vocabularies(dtype):
    seeds = torch.tensor([0x123456789ABCDEF])
    for vocab in (150, 4096, 5000):
        logits = 2 * randn(1, 2, vocab, seed=1, dtype=dtype)
        check(logits, seeds=seeds, offset=5, top_k=90, top_p=0.9)


def test_equal_logits_on_the_border():
    """top-k keeps all ties, and top-p drops those with the lowest indices first."""
    logits, noise = tied_logits((1, 1, 40)), noise_for_each_token(40)
    for top_k, top_p in ((7, 0.0), (0, 0.3), (0, 0.96), (30, 0.9), (0, 1e-9)):
        with emulation("race"):
            found = sample_tokens(logits.expand(1, 40, 40), top_k=top_k, top_p=top_p, noise=noise, backend="cuda")
        assert torch.equal(found[0] == torch.arange(40), restrict(logits.double(), top_k, top_p)[0, 0].isfinite())


def test_top_p_uses_its_budget():
    with emulation():
        assert_top_p_uses_its_budget(functools.partial(sample_tokens, backend="cuda"))


def test_nan_and_infinite_logits():
    logits = logits_with_special_values()
    for top_k, top_p in ((0, 0.0), (1, 0.0), (7, 0.5), (0, 0.9)):
        check(logits, variant="race", top_k=top_k, top_p=top_p, noise=noise_of(logits.shape, 2))


def test_strides_and_limits():
    wide = randn(4, 6, 330, seed=1)
    options = {"guidance": 1.0, "top_k": 40, "top_p": 0.9, "noise": noise_of((2, 3, 300), 1)}
    check(wide[:2, ::2, 5:305], wide[2:, ::2, 30:330], **options)
    check(wide[:2, ::2, 5:305].mT.contiguous().mT, wide[2:, ::2, 30:330], **options)
    with emulation("fast"), pytest.raises(RuntimeError, match="at most 16384 tokens"):
        sample_tokens(torch.zeros(1, 1, 16385), seeds=torch.zeros(1, dtype=torch.int64), backend="cuda")


def test_sanitizers_find_nothing():
    KERNELS.assert_sanitizers_find_nothing("""
        from tests.kernels.sample_tokens import test_cuda as tests
        for vocab in (17, 1025):
            logits = 4 * tests.randn(2, 2, vocab, seed=1)
            for options in ({"noise": tests.noise_of(logits.shape, 1)}, {"seeds": torch.arange(2), "offset": 3}):
                tests.check(logits, logits.flip(0), "sanitized", guidance=1.0, top_k=9, top_p=0.8, **options)
    """)


@pytest.mark.skipif(nvcc.unavailable_reason() is not None, reason=str(nvcc.unavailable_reason()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ptx_is_accurate(dtype):
    """Executes the code that nvcc compiles for sm_80 in the PTX interpreter, called from the same entry function."""
    from tools.gpu_emulation.cuda.ptx import execute_ptx_of

    conditional, unconditional = (4 * randn(1, 2, 300, seed=seed, dtype=dtype) for seed in (1, 2))
    for options in (
        {"guidance": 1.5, "top_k": 40, "top_p": 0.9, "seeds": torch.tensor([77]), "offset": 3},
        {"guidance": 1.5, "top_p": 0.5, "noise": noise_of((1, 2, 300), 1)},
    ):
        check(conditional, unconditional, executor=execute_ptx_of(SOURCE), **options)


REGISTERS = {"sample_tokens_kernel": 128}


@pytest.mark.evidence
@pytest.mark.parametrize("arch", machine_code.ARCHS)
def test_machine_code(arch, selected):
    kernels = machine_code.kernels(SOURCE, arch, selected("arch"))
    assert len(kernels) == 3 * 3  # for each dtype, three numbers of counters per thread
    # For vocabularies above 4096, each of 512 threads has 64 values, of which newer compilers spill a few.
    spilled = {"sm_100a": 16, "sm_120": 216}
    for kernel in kernels:
        machine_code.assert_resources(kernel, REGISTERS, spilled.get(arch, 0) if ", 8, 512>" in kernel.name else 0)


CODE = "sample_tokens.cuh"
MUTANTS = {
    "no barrier before the sums": Mutant(CODE, "    __syncthreads();\n    V result", "    V result", "race"),
    "one buffer for all": Mutant(CODE, "    turn ^= 1;\n", "", "race"),
    "tokens past the end": Mutant(CODE, "v < a.vocab) {", "v >= 0) {", "out_of_bounds", representative=True),
    "of the words the wrong one": Mutant(CODE, "exponential(words[w])", "exponential(words[3 - w])", "values"),
    "nine rounds": Mutant(CODE, "round < kPhiloxRounds", "round < kPhiloxRounds - 1", "values"),
    "one token too few": Mutant(CODE, "if (count > k)", "if (count > k + 1)", "values"),
    "top-p drops too much": Mutant(CODE, "a.dropped * total", "2 * a.dropped * total", "values"),
    "guidance of the other sign": Mutant(CODE, "* x - a.guidance", "* x + a.guidance", "values"),
}  # fmt: skip


def steps(faulty, looked_for):
    conditional, unconditional = (2 * randn(1, 12, 300, seed=seed) for seed in (1, 2))
    options = {"guidance": 1.5, "seeds": torch.tensor([77])}
    for choice in ({"top_p": 0.5}, {"top_k": 3}):
        yield functools.partial(check, conditional, unconditional, faulty, seed=1, **choice, **options)


@pytest.mark.parametrize("name", parameters(MUTANTS, others=pytest.mark.evidence))
def test_planted_faults_are_found(name, selected):
    assert_found(SOURCE, MUTANTS, name, steps, selected("name"), ("float",))


@pytest.mark.evidence
def test_nothing_is_found_without_a_fault():
    assert_nothing_found(SOURCE, MUTANTS, steps)
