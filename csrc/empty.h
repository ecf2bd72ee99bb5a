// Allocation of tensors in the entry functions of the ops.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace var_kernels {

// A dense tensor with unspecified contents. This calls the C shim directly: torch::stable::new_empty looks its operator
// up by name on every call, which took four of the seven microseconds of an op on one token.
inline torch::stable::Tensor empty_dense(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype,
                                         int32_t device_type, int32_t device_index) {
  constexpr size_t kMaxDims = 5;
  STD_TORCH_CHECK(sizes.size() <= kMaxDims, "empty_dense: at most ", kMaxDims, " dimensions");
  int64_t strides[kMaxDims] = {}, elements = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = elements;
    elements *= std::max<int64_t>(sizes.begin()[d], 1);  // as torch lays out empty tensors
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.begin(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace var_kernels
