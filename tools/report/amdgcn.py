"""Reads the assembly that LLVM writes for an AMD GPU: its metadata and its instructions."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .flow import Instruction

_METADATA = re.compile(r"^\s+(?:- )?\.(\w+):\s+(\S+)\s*$", re.M)
_LINE = re.compile(r"^(?:(\.?\w+):|\t([a-z][a-z0-9_]+)(?:[ \t]+([^;\n]*))?)", re.M)
_MFMA = re.compile(r"v_mfma_(\w+?)_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?(\w+)")


@dataclass(frozen=True)
class Function:
    """A kernel's resources and instructions. Bytes and registers are those of LLVM's metadata."""

    vgprs: int  # accumulation registers included
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int  # bytes per lane
    shared_memory: int
    instructions: tuple[Instruction, ...]


def parse(text: str, kernel: str) -> Function:
    """The kernel of this name. ValueError if the assembly does not have it."""
    body = re.search(rf"^{re.escape(kernel)}:.*?^\.Lfunc_end", text, re.M | re.S)
    block = re.search(r"^amdhsa\.kernels:\n(.*?)^amdhsa\.", text, re.M | re.S)
    if body is None or block is None:
        raise ValueError(f"kernel: expected one that the assembly defines, got {kernel!r}")
    entries = re.split(r"^  - ", block[1], flags=re.M)[1:]
    # The first key of an entry follows its dash on the same line.
    metadata = next((found for entry in entries
                     if (found := dict(_METADATA.findall("    " + entry))).get("name") == kernel), None)  # fmt: skip
    if metadata is None:
        raise ValueError(f"kernel: expected one with metadata, got {kernel!r}")
    return Function(
        vgprs=int(metadata["vgpr_count"]),
        agprs=int(metadata.get("agpr_count", 0)),
        sgprs=int(metadata["sgpr_count"]),
        vgpr_spills=int(metadata["vgpr_spill_count"]),
        sgpr_spills=int(metadata["sgpr_spill_count"]),
        scratch=int(metadata["private_segment_fixed_size"]),
        shared_memory=int(metadata["group_segment_fixed_size"]),
        instructions=tuple(_instructions(body[0])),
    )


def _instructions(body: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for label, opcode, operands in _LINE.findall(body):
        if label:
            labels[label] = len(lines)
        else:
            lines.append((opcode, operands.strip()))
    instructions = []
    for position, (opcode, operands) in enumerate(lines):
        successors = None
        if opcode == "s_endpgm":
            successors = ()
        elif opcode == "s_branch":
            successors = (labels[operands],)
        elif opcode.startswith("s_cbranch"):
            successors = tuple(sorted({labels[operands], position + 1}))
        instructions.append(Instruction(opcode, successors))
    return instructions


def tensor_work(opcode: str) -> tuple[str, int] | None:
    """The name in `Card.tensor_rates` of a matrix instruction's rate, and its FLOP."""
    match = _MFMA.match(opcode)
    if match is None:
        return None
    _, m, n, k, blocks, kind = match.groups()
    precision = "16" if re.match(r"b?f16", kind) else "f32" if kind == "f32" else None
    if precision is None:
        return None
    return f"MFMA {precision}", int(m) * int(n) * int(k) * int(blocks or 1) * 2


def counts(opcodes) -> Counter:
    """The number of instructions of each kind that the report shows."""
    result: Counter = Counter()
    for opcode in opcodes:
        result["instructions"] += 1
        if opcode.startswith("v_mfma"):
            result["tensor MFMA"] += 1
            result["rounded fp32"] += "xf32" in opcode
        elif opcode.startswith("v_"):
            result["vector"] += 1
        if re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", opcode):
            result["exp"] += 1
        if re.match(r"(buffer|global|flat)_atomic", opcode):
            result["atomics"] += 1
        elif access := re.match(r"(?:buffer|global|flat)_(load|store)_", opcode):
            name = access[1] + "s"
            result[name] += 1
            result[name + " wide"] += opcode.endswith("x4")
        if opcode.startswith("s_barrier"):
            result["barriers"] += 1
        if re.match(r"ds_(bpermute|permute|swizzle)|v_\w+_dpp", opcode):
            result["shuffles"] += 1
    return result
