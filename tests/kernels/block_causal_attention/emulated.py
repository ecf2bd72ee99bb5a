"""The CUDA kernels of attention in the emulation, and the schedules and head dimensions of their tests."""

import functools

import pytest
import torch

from tools.gpu_emulation.cuda import load, serving
from var_kernels.native import build as native_build

SOURCE = native_build.CSRC / "cuda" / "block_causal_attention.cu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
SHORT = (1, 4, 9, 16, 25, 36)  # 91 tokens
# Kernels are compiled for 64, 96 and 128 columns. Some of these dimensions fill the columns, others are padded.
TENSOR_CORE_DIMS = (8, 40, 64, 72, 96, 104, 128)


@functools.cache
def emulated(variant):
    return load(variant, [SOURCE])


def emulation(variant="fast", **options):
    """A context in which backend="cuda" is the emulation; raises EmulationError with its findings."""
    return serving(emulated(variant) if isinstance(variant, str) else variant, **options)


needs_nvcc = pytest.mark.skipif(native_build.find_nvcc() is None, reason="nvcc is not installed")
