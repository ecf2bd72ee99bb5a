"""GPU code that runs on a CPU: CUDA C++ with checked accesses, PTX, and what Triton compiles."""
