"""Runs GPU code on a CPU: CUDA C++ with checked accesses, PTX, and Triton launches."""
