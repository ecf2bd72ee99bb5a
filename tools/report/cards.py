"""Published limits and peaks of one card per target. Everything computed from them is a static bound."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One GPU. Rates are per multiprocessor (on AMD per compute unit) and clock. None means not published."""

    name: str
    source: str
    bandwidth: float  # bytes/s of device memory
    peak_16bit: float  # dense FLOP/s of tensor cores, bfloat16 or float16 products with float32 sums
    peak_fp32: float  # FLOP/s in IEEE float32, of CUDA cores; on AMD of matrix cores
    clock: float | None  # Hz, at which the peaks are stated
    warps: int  # the most that are resident
    blocks: int
    shared_memory: int  # bytes of a multiprocessor that blocks can use
    fp32_rate: int  # lanes per clock that add, multiply or do both; on AMD lanes of any vector instruction
    # FLOP per clock of each kind of tensor-core instruction. Absent kinds are not documented, so no cycles are computed
    # for them.
    tensor_rates: dict[str, int]
    exp_rate: int | None = 16  # lanes per clock of the unit for exponentials and reciprocals


# Limits and arithmetic throughput: CUDA C++ Programming Guide, tables of technical specifications and of throughput of
# arithmetic instructions per compute capability. Tensor rates are the published dense peaks, divided by the number of
# multiprocessors and by the clock. This gives no rate of HMMA on sm_90 and sm_100, where only other instructions reach
# the published peak, and none of UTCHMMA on sm_100, whose text does not say how large the product is. AMD: CDNA 2 and 3
# white papers; a SIMD holds 8 waves, a compute unit 16 work groups of more than one wave.
CARDS = {
    "sm_80": Card(
        "A100 SXM 80 GB", "NVIDIA A100 datasheet", 2039e9, 312e12, 19.5e12, 1.41e9,
        64, 32, 164 << 10, 64, {"HMMA 16": 2048, "HMMA tf32": 1024},
    ),
    "sm_86": Card(
        "RTX 3090", "NVIDIA GA102 white paper", 936e9, 71e12, 35.6e12, 1.695e9,
        48, 16, 100 << 10, 128, {"HMMA 16": 512, "HMMA tf32": 256},
    ),
    "sm_89": Card(
        "RTX 4090", "NVIDIA Ada white paper", 1008e9, 165.2e12, 82.6e12, 2.52e9,
        48, 24, 100 << 10, 128, {"HMMA 16": 512, "HMMA tf32": 256},
    ),
    "sm_90": Card(
        "H100 SXM", "NVIDIA H100 datasheet", 3350e9, 989.4e12, 66.9e12, 1.83e9,
        64, 32, 228 << 10, 128, {"HGMMA 16": 4096, "HGMMA tf32": 2048},
    ),
    "sm_100": Card(
        "B200", "NVIDIA Blackwell architecture brief, HGX B200", 8000e9, 2250e12, 80e12, 1.85e9,
        64, 32, 228 << 10, 128, {},
    ),
    "sm_120": Card(
        "RTX 5090", "NVIDIA RTX Blackwell white paper", 1792e9, 209.5e12, 104.8e12, 2.407e9,
        48, 24, 100 << 10, 128, {"HMMA 16": 512, "HMMA tf32": 256},
    ),
    "gfx90a": Card(
        "MI250X, one of two dies", "AMD Instinct MI250X datasheet", 1638e9, 191.5e12, 47.9e12, 1.7e9,
        32, 16, 64 << 10, 64, {"MFMA 16": 1024, "MFMA f32": 256}, None,
    ),
    "gfx942": Card(
        "MI300X", "AMD Instinct MI300X datasheet", 5300e9, 1307.4e12, 163.4e12, 2.1e9,
        32, 16, 64 << 10, 64, {"MFMA 16": 2048, "MFMA f32": 256}, None,
    ),
}  # fmt: skip
