// Quotients rounded up, for host code. The `*.isa.cpp` files have their own in isa.h, compiled for each instruction
// set.
#pragma once
#include <cstdint>

namespace var_kernels {

constexpr int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

}  // namespace var_kernels
