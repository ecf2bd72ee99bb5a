"""The CUDA kernels of attention in the emulation, and the schedules and head dimensions of their tests."""

import pytest
import torch

from tests.helpers.cuda_emulation import EmulatedKernels
from var_kernels.native import build as native_build

SOURCE = native_build.CSRC / "cuda" / "block_causal_attention.cu"
KERNELS = EmulatedKernels(SOURCE)
emulated, emulation = KERNELS.load, KERNELS.serving
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALVES = DTYPES[1:]
SHORT = (1, 4, 9, 16, 25, 36)  # 91 tokens
# Kernels are compiled for 64, 96 and 128 columns. Some of these dimensions fill the columns, others are padded.
TENSOR_CORE_DIMS = (8, 40, 64, 72, 96, 104, 128)

needs_nvcc = pytest.mark.skipif(native_build.find_nvcc() is None, reason="nvcc is not installed")
