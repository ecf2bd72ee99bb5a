"""What the benchmarks measured on one kind of GPU, in files beside the compiled kernels."""
