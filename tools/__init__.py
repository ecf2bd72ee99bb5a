"""Tools that check the GPU kernels on a machine without a GPU. Nothing here is part of the installed package."""
