"""The specification of every op, in plain torch: differentiable, on any device. The kernels are compared with it."""
