"""The machine code that nvcc makes of the CUDA kernels, for tests: every kernel of a file, launched or not.

    @pytest.mark.evidence
    @pytest.mark.parametrize("arch", machine_code.ARCHS)
    def test_machine_code(arch, selected):
        for kernel in machine_code.kernels(SOURCE, arch, selected("arch")):
            machine_code.assert_resources(kernel, {"forward_kernel<bf16": 96, "": 128})
            assert not kernel.narrow("LDG")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools.gpu_emulation.cuda import nvcc

from . import sass
from .rows import functions

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")


@dataclass(frozen=True)
class Kernel:
    """One kernel. `name` is that of `nvcc.plain_name`, such as "forward_kernel<bf16, 64>". `stack` is in bytes per
    thread."""

    name: str
    registers: int
    stack: int
    shared_memory: int
    opcodes: tuple[str, ...]

    def having(self, base: str) -> list[str]:
        """The instructions of one kind, such as "LDG", "STG", "LDGSTS" or "HMMA"."""
        return [opcode for opcode in self.opcodes if opcode.partition(".")[0] == base]

    def narrow(self, base: str) -> list[str]:
        """The accesses of one kind that move less than 128 bits."""
        return [opcode for opcode in self.having(base) if not sass.is_wide(opcode)]

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return len(self.having("LDL") + self.having("STL"))


def kernels(source: Path, arch: str, archs: Sequence[str] = ()) -> list[Kernel]:
    """The kernels of a .cu file for `arch`. It also compiles all of `archs`, which the run needs as well, two at a
    time.

    Skips the test if nvcc is missing, or Triton, which contains nvdisasm and cuobjdump.
    """
    pytest.importorskip("triton")
    if reason := nvcc.unavailable_reason():
        pytest.skip(reason)
    nvcc.outputs(source, archs, "cubin")
    found = functions(nvcc.output(source, arch, "cubin").read_bytes())
    return [
        Kernel(name, function.registers, function.stack, function.shared_memory,
               tuple(instruction.opcode for instruction in function.instructions))
        for name, function in zip(nvcc.plain_names(list(found)), found.values(), strict=True)
    ]  # fmt: skip


def assert_resources(kernel: Kernel, registers: Mapping[str, int], stack: int = 0) -> None:
    """Asserts no stack beyond `stack` bytes (0: and no spills), and at most the registers of the first prefix of its
    name."""
    assert kernel.stack <= stack and (stack or not kernel.spills), f"{kernel.name}: {kernel.stack} bytes of stack"
    limit = next((limit for prefix, limit in registers.items() if kernel.name.startswith(prefix)), None)
    assert limit is not None, f"{kernel.name}: no budget of registers"
    assert kernel.registers <= limit, f"{kernel.name}: {kernel.registers} registers"
