"""An interpreter of PTX text, for checking GPU kernels on a machine without a GPU.

    module = parse(text)
    memory = Memory()
    memory.add("x", x)                               # a numpy array; its own address is its device address
    stats = run(module.kernels["k"], [x.ctypes.data, x.size, 0.5], grid=(4, 1, 1), threads=(128, 1, 1), memory=memory)

It executes the PTX that compilers write for sm_80, of Triton kernels and of CUDA C++ with inline assembly. So bf16,
predication, vector widths and addresses are those of the compiled code. An instruction or modifier that is not modelled
is an error. So is every access whose result is undefined on a GPU: out of bounds, misaligned, uninitialised (registers,
shared and local memory, buffers added with `defined=False`), an access to the target of a cp.async in flight, a race
with another warp in shared memory.

It cannot show: speed; the last bits of approximate functions and of sums in mma (`numerics`, `warp`); races within a
warp, because a warp runs in lock-step; races in global memory, because blocks and atomics run in a fixed order; missing
fences.
"""

from .decode import Module, parse
from .errors import PtxError
from .execution import Stats, run
from .memory import Memory
from .syntax import Kernel

__all__ = ["Kernel", "Memory", "Module", "PtxError", "Stats", "parse", "run"]
