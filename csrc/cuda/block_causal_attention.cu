// The launchers and the door of block_causal_attention on CUDA devices.
#include "block_causal_attention.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "../block_causal_attention_checks.h"
#include "launch.h"

namespace var_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Lens = std::vector<int64_t>;

// ---- tensors as kernels see them ----------------------------------------------------------------------------------

int64_t stride_of(const Tensor& x, int64_t dim) { return x.size(dim) > 1 ? x.stride(dim) : 0; }

HeadRows rows_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2)};
}
HeadRows output_rows(const Tensor& x) { return {x.mutable_data_ptr(), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2)}; }

// Whether rows consist of whole, aligned 16-byte chunks of two-byte elements.
bool chunks_fit(const HeadRows& x, int64_t dim) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.batch | x.head | x.row | dim) % 8 == 0;
}

// empty_like(x), without its lookup by name where x is contiguous.
Tensor empty_as(const OnDevice& device, const Tensor& x) {
  if (x.is_contiguous()) return device.empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  return torch::stable::empty_like(x);
}

template <class F>
void with_dtype(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::BFloat16: return f(bf16());
    default: return f(fp16());
  }
}

// The width that kernels are compiled for which serves head dimension `dim`.
constexpr int kMaxTensorCoreDim = 128;
template <class F>
void with_tensor_core_dim(int64_t dim, const F& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>());
  if (dim <= 96) return f(std::integral_constant<int, 96>());
  return f(std::integral_constant<int, kMaxTensorCoreDim>());
}
template <class F>
void with_plain_dim(int64_t dim, const F& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>());
  if (dim <= 128) return f(std::integral_constant<int, 128>());
  return f(std::integral_constant<int, 256>());
}

// ---- schedules and grids ------------------------------------------------------------------------------------------

// The numbers of a schedule in device memory. A part of them travels as arguments of each of these launches.
Tensor write_schedule(const OnDevice& device, const std::vector<int32_t>& numbers) {
  Tensor memory = device.empty({int64_t(numbers.size())}, ScalarType::Int);
  int32_t* const target = memory.mutable_data_ptr<int32_t>();
  for (size_t begin = 0; begin < numbers.size(); begin += AttentionSchedule::kInline) {
    ScheduleNumbers part = {target + begin, int(std::min<size_t>(numbers.size() - begin, AttentionSchedule::kInline)), {}};
    std::copy_n(numbers.begin() + begin, part.count, part.numbers);
    launch(device, "block_causal_attention schedule", write_schedule_kernel, {dim3(1), dim3(128)}, part);
  }
  return memory;
}

// One launch over `tiles`, for each of `heads` heads in the batch, of which every `group` share a key head.
struct Grid {
  AttentionProblem problem = {};
  Tensor memory;  // of the schedule, if it needs any
  unsigned blocks;

  Grid(const OnDevice& device, const Tensor& q, const Tensor& k, const Lens& lens, int64_t q_offset,
       const std::vector<AttentionTile>& tiles, int64_t heads, int64_t streamed_rows)
      : memory(q) {
    // Keys and values of a section, or queries and dout: less than half of the L2 cache of an A100, H100 or B200.
    constexpr int64_t kSectionBytes = 16 << 20;
    const int64_t pairs = q.size(0) * heads, bytes = q.scalar_type() == ScalarType::Float ? 4 : 2;
    const int64_t per_pair = 2 * std::max<int64_t>(streamed_rows, 1) * q.size(3) * bytes;
    const int64_t section = std::clamp<int64_t>(kSectionBytes / per_pair, 1, pairs);
    VAR_CHECK(pairs * int64_t(tiles.size()) <= std::numeric_limits<int>::max(), "q",
              "less than 2^31 tiles in all heads", pairs * int64_t(tiles.size()));
    blocks = unsigned(pairs * int64_t(tiles.size()));
    problem.heads = int(heads);
    problem.group = int(q.size(1) / k.size(1));
    problem.queries = int(q.size(2));
    problem.keys = int(k.size(2));
    problem.dim = int(q.size(3));
    problem.q_offset = int(q_offset);
    problem.pairs = int(pairs);
    problem.section = int(section);
    AttentionSchedule& schedule = problem.schedule;
    const std::vector<int32_t> numbers = attention_tiles::numbers_of(tiles, lens, schedule.runs);
    schedule.tiles = int(tiles.size());
    if (numbers.size() <= AttentionSchedule::kInline) {
      std::copy(numbers.begin(), numbers.end(), schedule.numbers);
    } else {
      memory = write_schedule(device, numbers);
      schedule.in_memory = memory.const_data_ptr<int32_t>();
    }
  }

  LaunchShape shape(size_t shared_bytes) const { return {dim3(blocks), dim3(kAttentionThreads), shared_bytes}; }
};

void check_lengths(const Tensor& k) {
  VAR_CHECK(k.size(2) < std::numeric_limits<int>::max() / 2, "k", "less than 2^30 keys", k.size(2));
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T>
void launch_forward(const OnDevice& device, const AttentionForward& arguments, const Grid& grid, bool tensor_cores) {
  const int dim = arguments.problem.dim;
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores)
      return with_tensor_core_dim(dim, [&](auto width) {
        constexpr int kDim = decltype(width)::value;
        launch(device, "block_causal_attention", attention_forward_kernel<T, kDim>,
               grid.shape(forward_shared_bytes(kDim)), arguments);
      });
  }
  with_plain_dim(dim, [&](auto width) {
    launch(device, "block_causal_attention (plain)", plain_attention_forward_kernel<T, decltype(width)::value>,
           grid.shape(plain_forward_shared_bytes(dim)), arguments);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Lens& scale_lens,
                                   double softmax_scale, int64_t q_offset) {
  check_attention(q, k, v, scale_lens, q_offset);
  check_lengths(k);
  const OnDevice device(q);
  Tensor out = empty_as(device, q), lse = device.empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  AttentionForward arguments = {rows_of(q), rows_of(k), rows_of(v), output_rows(out), lse.mutable_data_ptr<float>(),
                                0.0f, softmax_scale < 0 ? 0x80008000u : 0u, {}};
  // Not zero: the -inf of an invisible score times zero would be NaN.
  arguments.scale_log2 = std::max(float(std::abs(softmax_scale) * 1.4426950408889634), 1e-30f);
  const bool tensor_cores = q.scalar_type() != ScalarType::Float && q.size(3) <= kMaxTensorCoreDim &&
                            chunks_fit(arguments.q, q.size(3)) && chunks_fit(arguments.k, q.size(3)) &&
                            chunks_fit(arguments.v, q.size(3)) && chunks_fit(arguments.out, q.size(3));
  const std::vector<AttentionTile> tiles =
      tensor_cores ? attention_tiles::of_queries(scale_lens, q_offset, q.size(2), kForwardRows, kForwardKeys)
                   : attention_tiles::of_queries(scale_lens, q_offset, q.size(2), kPlainRows, kPlainKeys);
  const Grid grid(device, q, k, scale_lens, q_offset, tiles, q.size(1), k.size(2) * k.size(1) / q.size(1));
  arguments.problem = grid.problem;
  with_dtype(q, [&](auto zero) { launch_forward<decltype(zero)>(device, arguments, grid, tensor_cores); });
  return {out, lse};
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) { m.impl("_block_causal_attention", TORCH_BOX(&var_kernels::forward)); }
