// What the searches of the CPU and of CUDA share of the centre of a codebook.
#pragma once

namespace var_kernels {

constexpr int kCentreCodes = 32;  // the codes from which it is computed, spread evenly over the codebook

}  // namespace var_kernels
