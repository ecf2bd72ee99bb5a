"""Ops for inference that have kernels for CPUs only: packed linear layers, convolutions, group normalisation."""
