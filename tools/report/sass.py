"""Reads the machine code of an NVIDIA GPU, from the output of the CUDA toolkit's nvdisasm and cuobjdump."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .flow import Instruction

_LINE = re.compile(r"^(?:(\.L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;\n]*);)", re.M)
_SECTION = re.compile(r"^\.text\.(\S+):$", re.M)
_USAGE = re.compile(r"^ Function (\S+):\s*\n(.*)$", re.M)
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_BARRIER = re.compile(r"\bB\d+\b")
_TENSOR = re.compile(r"HMMA|HGMMA|IMMA|IGMMA|DMMA|QMMA|QGMMA|OMMA|UTC\w*MMA")
_NEVER_RETURNS = {"EXIT", "RET", "BRX", "JMX", "BRXU", "JMXU"}


@dataclass(frozen=True)
class Function:
    """A kernel's resources and instructions. Shared memory is the part that the kernel declares, in bytes."""

    registers: int
    stack: int  # bytes of local memory per thread
    shared_memory: int
    instructions: tuple[Instruction, ...]


def read(cubin: bytes, nvdisasm: str, cuobjdump: str) -> dict[str, Function]:
    """The kernels of a binary by name. RuntimeError with the message of the tool that fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        # `cuobjdump -sass` would start nvdisasm with its data-flow analysis, which takes 1.5 times as long.
        return parse(_run(nvdisasm, "-c", "-ndf", path), _run(cuobjdump, "-res-usage", path))


def _run(tool: str, *arguments) -> str:
    result = subprocess.run([tool, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{tool}: exit status {result.returncode}: {result.stderr.strip()[:1000]}")
    return result.stdout


def parse(code: str, usage: str) -> dict[str, Function]:
    """The kernels by name, from the outputs of `nvdisasm -c -ndf` and `cuobjdump -res-usage`."""
    usages = {name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
              for name, line in _USAGE.findall(usage)}  # fmt: skip
    # From compute capability 9.0 on, the kernel's shared memory includes the kilobyte that the driver reserves per
    # block.
    architecture = re.search(r"^\s*\.target\s+sm_(\d+)", code, re.M)
    reserved = 1024 if architecture and int(architecture[1]) >= 90 else 0
    pieces = _SECTION.split(code)
    functions = {}
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        used = usages[name]
        shared = max(0, used["SHARED"] - reserved)
        functions[name] = Function(used["REG"], used["STACK"], shared, tuple(_instructions(body)))
    return functions


def _instructions(body: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, str]] = []
    for label, *line in _LINE.findall(body):
        if label:
            labels[label] = len(lines)
        else:
            lines.append(tuple(line))
    reconvergence: dict[str, int] = {}  # barrier register -> where the threads that wait at it continue
    instructions = []
    for position, (guard, opcode, operands) in enumerate(lines):
        base = opcode.partition(".")[0]
        successors = None
        target = labels[label[1]] if (label := _TARGET.search(operands)) else None
        barrier = _BARRIER.search(operands)
        if base == "BSSY" and barrier and target is not None:
            reconvergence[barrier[0]] = target
        elif base == "BSYNC" and barrier and barrier[0] in reconvergence:
            successors = {reconvergence[barrier[0]]}
        elif base in ("BRA", "JMP") and target is not None:
            successors = {target}
            if "," in operands:  # a conditional branch, with a predicate among the operands
                successors.add(position + 1)
        elif base == "CALL" and target is not None:
            successors = {target, position + 1}  # ptxas also leaves a loop for distant code so
        elif base in _NEVER_RETURNS:
            successors = set()
        if successors is not None and guard:
            successors.add(position + 1)
        instructions.append(Instruction(opcode, None if successors is None else tuple(sorted(successors))))
    return instructions


def tensor_kind(opcode: str) -> str | None:
    """The kind of a tensor-core instruction, such as HMMA or UTCHMMA. None for any other instruction."""
    match = _TENSOR.fullmatch(opcode.partition(".")[0])
    return match and match[0]


def tensor_work(opcode: str) -> tuple[str, int] | None:
    """The name of the rate in `Card.tensor_rates`, and the FLOP of one warp. None if the text does not say them."""
    kind, _, rest = opcode.partition(".")
    precision = "tf32" if "TF32" in rest else "16" if re.search(r"F16|BF16|F32$", rest) else None
    if precision is None:
        return None
    if kind == "HMMA" and (shape := re.match(r"168(\d+)\.", rest)):
        return f"HMMA {precision}", 16 * 8 * int(shape[1]) * 2
    if kind == "HGMMA" and (shape := re.match(r"64x(\d+)x(\d+)\.", rest)):  # one instruction of four warps
        return f"HGMMA {precision}", 64 * int(shape[1]) * int(shape[2]) * 2 // 4
    return None


def is_wide(opcode: str) -> bool:
    """Whether a memory access moves 128 bits per thread or more. A hint such as LTC128B is not a width."""
    return not {"128", "256"}.isdisjoint(opcode.split("."))


def counts(opcodes) -> Counter:
    """The number of instructions of each kind that the report shows."""
    result: Counter = Counter()
    for opcode in opcodes:
        base = opcode.partition(".")[0]
        result["instructions"] += base != "NOP"
        if (kind := tensor_kind(opcode)) is not None:
            result[f"tensor {kind}"] += 1
            result["rounded fp32"] += "TF32" in opcode
        for name in _GROUPS.get(base, ()):
            result[name] += 2 if base in _PACKED else 1
        if base in _ACCESSES:
            result[_ACCESSES[base]] += 1
            result[_ACCESSES[base] + " wide"] += is_wide(opcode)
        if base.startswith(("UTMA", "UBLK")):
            result["bulk copies"] += 1
    return result


_ACCESSES = {"LDG": "loads", "STG": "stores", "LDGSTS": "async copies"}
_PACKED = ("FADD2", "FMUL2", "FFMA2")  # two operations each, on sm_100
_GROUPS = {
    "LDL": ("spills",),
    "STL": ("spills",),
    "SHFL": ("shuffles",),
    "MUFU": ("exp",),
    "BAR": ("barriers",),
    "LDSM": ("matrix loads",),
    **dict.fromkeys(("ATOM", "ATOMG", "RED", "REDG"), ("atomics",)),
    **dict.fromkeys(("FADD", "FMUL", "FFMA", *_PACKED), ("fp32",)),
}
