"""The Triton backend, for NVIDIA (compute capability 8.0 and newer) and AMD GPUs; imported at its first use.

Each op has a module with its kernels and launchers. `configs` is the table of tile sizes, `targets` describes the GPUs
that the table distinguishes, `launch` is the one function that starts every kernel, and `offline` compiles a launch for
any target without a GPU.
"""
