"""Static evidence for the GPU kernels, on a machine without a GPU: ``python -m tools.report``.

Every named problem of `problems` is launched as a user would launch it, for each target; the launches are recorded and
compiled (`triton_source`, `cuda_source`) and read (`rows`, `sass`, `amdgcn`): registers, spills, shared memory,
occupancy, tensor-core instructions, width of the memory accesses, the main loop. `bounds` adds what follows from
published peaks. Nothing is executed: a static bound is not a measurement. `budgets` holds what has been reached, and
fails when it is lost.
"""
