"""An interpreter of PTX text, for checking GPU kernels on a machine without a GPU.

    module = parse(text)
    memory = Memory()
    memory.add("x", x)                               # a numpy array; its own address is its device address
    stats = run(module.kernels["k"], [x.ctypes.data, x.size, 0.5], grid=(4, 1, 1), threads=(128, 1, 1), memory=memory)

It executes what compilers write for sm_80 (Triton's kernels, and CUDA C++ with inline assembly): bf16 and predication
as they are, real vector widths and addresses. An instruction or modifier that is not modelled is an error, and so is
every access that a GPU would not define: out of bounds, misaligned, uninitialised (registers, shared and local memory,
buffers added with `defined=False`), overtaking a cp.async, racing with another warp in shared memory.

What it cannot show: speed; the last bits of approximate functions and of the order of sums in mma (`numerics`, `warp`);
races within a warp, which runs in lock-step; races in global memory, since blocks and atomics run in a fixed order;
missing fences.
"""

from .decode import Module, parse
from .errors import PtxError
from .execution import Stats, run
from .memory import Memory
from .syntax import Kernel

__all__ = ["Kernel", "Memory", "Module", "PtxError", "Stats", "parse", "run"]
