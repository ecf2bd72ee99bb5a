"""Tests the tests of the CPU kernels with planted faults, which are deliberate errors in a copy of `csrc/cpu`.

Each fault must make the tests named beside it fail. Without a fault they pass, as every run of the tests shows.
"""

import re

import pytest

from tests.helpers.cpu_faults import FaultyLibraries
from tests.kernels.cpu_mutants import MUTANTS, PAIRS
from tools.gpu_emulation.planted_faults import parameters
from var_kernels.testing import isa_levels


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    # AMX is left out, because oneDNN replaces one of our kernels there.
    levels = [level for level in isa_levels() if level != "amx"]
    if levels[-1:] not in (["avx512"], ["avx512_bf16"]):
        pytest.skip("the faults are in lines that AVX-512 executes")
    return FaultyLibraries(tmp_path_factory.mktemp("faulty"), levels[-1])


@pytest.mark.parametrize("name", parameters(MUTANTS, others=pytest.mark.evidence))
def test_mutant_is_caught(libraries, name):
    if name in PAIRS and libraries.level != "avx512_bf16":
        pytest.skip("this machine has no products of pairs of bf16")
    mutant = MUTANTS[name]
    answer = libraries.run(libraries.build(mutant), mutant.check)
    # There is one failure, of a test and not of an import, or the process dies of an access to memory.
    failed = answer.returncode == 1 and re.search(r"^1 failed", answer.stdout.splitlines()[-1])
    assert failed or answer.returncode < 0, answer.stdout
