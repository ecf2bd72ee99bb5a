"""Files with measurements on one kind of GPU: the speeds of the backends, and configurations of Triton kernels."""
