"""How many blocks of a kernel one multiprocessor holds at a time, and which resource limits this number.

For NVIDIA, these are the rules of `cuda_occupancy.h` of the CUDA toolkit. For AMD, these are the rules of LLVM's AMDGPU
backend for the unified register file of CDNA 2 and 3, which has 512 vector registers per lane of a SIMD.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cards import CARDS

_PARTITIONS = 4  # per multiprocessor, each with its own scheduler and registers; on AMD the SIMDs of a compute unit
_REGISTERS = 65536  # of 32 bits, per multiprocessor
_REGISTER_UNIT = 256  # allocated to a warp at a time
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024  # bytes that the driver reserves in each block
_TENSOR_COLUMNS = 512  # columns of tensor memory per multiprocessor, sm_100


@dataclass(frozen=True)
class Occupancy:
    """The number of blocks per multiprocessor, their share of the resident warps, and the resource that limits it."""

    blocks: int
    share: float
    limit: str


def nvidia(target: str, *, registers: int, threads: int, shared_memory: int, tensor_columns: int = 0) -> Occupancy:
    """Occupancy of blocks with `threads` threads, which use `registers` each and `shared_memory` bytes together."""
    card = CARDS[target]
    warps = -(-threads // 32)
    per_warp = _round_up(registers * 32, _REGISTER_UNIT)
    limits = {
        "warps": card.warps // warps,
        "blocks": card.blocks,
        "registers": _REGISTERS // _PARTITIONS // per_warp * _PARTITIONS // warps,
        "shared memory": card.shared_memory // _round_up(shared_memory + _SHARED_RESERVED, _SHARED_UNIT),
    }
    if tensor_columns:
        limits["tensor memory"] = _TENSOR_COLUMNS // tensor_columns
    return _least(limits, warps, card.warps)


def amd(target: str, *, vgprs: int, sgprs: int, threads: int, shared_memory: int) -> Occupancy:
    """Occupancy of work groups. `vgprs` includes accumulation registers."""
    card = CARDS[target]
    waves = -(-threads // 64)
    resident = card.warps // _PARTITIONS
    by_vgprs = min(resident, 512 // _round_up(max(vgprs, 1), 8))
    by_sgprs = 7 if sgprs > 100 else resident
    limits = {
        "waves": card.warps // waves,
        "work groups": card.blocks,
        "registers": min(by_vgprs, by_sgprs) * _PARTITIONS // waves,
        "LDS": card.shared_memory // max(shared_memory, 1),
    }
    return _least(limits, waves, card.warps)


def _least(limits: dict[str, int], warps: int, resident: int) -> Occupancy:
    limit = min(limits, key=limits.__getitem__)
    return Occupancy(limits[limit], limits[limit] * warps / resident, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
