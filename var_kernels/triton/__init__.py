"""The Triton backend, for NVIDIA (compute capability 8.0 and newer) and AMD GPUs; imported at its first use.

One module per op holds its kernels and launchers; `configs` is the table of tile sizes, `targets` the GPUs that it
distinguishes, `launch` the one door through which every kernel is started, and `offline` compiles a launch for any
target without a GPU.
"""
