"""A report on the compiled GPU kernels, on a machine without a GPU: ``python -m tools.report``. See README.md.

Every named problem of `var_kernels.triton.problems` is launched for each target, as a user would launch it. The
launches are recorded and compiled (`triton_source`, `cuda_source`), and the machine code is read (`rows`, `sass`,
`amdgcn`): registers, spills, shared memory, occupancy, tensor-core instructions, widths of the memory accesses, the
main loop. `bounds` adds the bounds that follow from published peaks. Nothing is executed, and a static bound is not a
measurement. `budgets` records what the kernels use, and its check fails when a kernel gets worse.
"""
