// The launchers and the entry functions of block_causal_attention on CUDA devices.
#include "block_causal_attention.cuh"
#include "block_causal_attention_backward.cuh"
#include "block_causal_attention_parts.cuh"
#include "block_causal_attention_plain_backward.cuh"
#include "block_causal_attention_tf32.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
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

GpuHeadRows rows_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2)};
}
GpuHeadRows output_rows(const Tensor& x) {
  return {x.mutable_data_ptr(), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2)};
}

// Whether rows consist of whole, aligned 16-byte chunks of `width` elements.
bool chunks_fit(const GpuHeadRows& x, int64_t dim, int64_t width = 8) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.batch | x.head | x.row | dim) % width == 0;
}

// Like empty_like(x), but a contiguous x does not pay for empty_like's lookup by name.
Tensor empty_as(const OnDevice& device, const Tensor& x) {
  if (x.is_contiguous()) return device.empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  return torch::stable::empty_like(x);
}

// The width, of those that kernels are compiled for, which serves head dimension `dim`.
constexpr int kMaxTensorCoreDim = 128;
template <class F>
void with_tensor_core_dim(int64_t dim, const F& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>());
  if (dim <= 96) return f(std::integral_constant<int, 96>());
  return f(std::integral_constant<int, kMaxTensorCoreDim>());
}
template <class F>
void with_tf32_dim(int64_t dim, const F& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>());
  return f(std::integral_constant<int, kMaxTensorCoreDim>());
}
template <class F>
void with_plain_dim(int64_t dim, const F& f) {
  if (dim <= 64) return f(std::integral_constant<int, 64>());
  if (dim <= 128) return f(std::integral_constant<int, 128>());
  return f(std::integral_constant<int, 256>());
}

// ---- schedules and grids ------------------------------------------------------------------------------------------

// Writes the numbers of a schedule to device memory. Each of these launches takes a part of the numbers as arguments.
Tensor write_schedule(const OnDevice& device, const std::vector<int32_t>& numbers) {
  Tensor memory = device.empty({int64_t(numbers.size())}, ScalarType::Int);
  int32_t* const target = memory.mutable_data_ptr<int32_t>();
  for (size_t begin = 0; begin < numbers.size(); begin += AttentionSchedule::kInline) {
    const size_t count = std::min<size_t>(numbers.size() - begin, AttentionSchedule::kInline);
    ScheduleNumbers part = {target + begin, int(count), {}};
    std::copy_n(numbers.begin() + begin, part.count, part.numbers);
    launch(device, "block_causal_attention schedule", write_schedule_kernel, {dim3(1), dim3(128)}, part);
  }
  return memory;
}

// One launch over `tiles`, for each of the `heads` heads of every batch entry. `group` consecutive heads share a key
// head.
struct Grid {
  GpuAttentionProblem problem = {};
  Tensor memory;  // holds the schedule if it does not fit in the arguments
  unsigned blocks;

  Grid(const OnDevice& device, const Tensor& q, const Tensor& k, const Lens& lens, int64_t q_offset,
       const std::vector<AttentionTile>& tiles, int64_t heads, int64_t streamed_rows)
      : memory(q) {
    // The keys and values of a section, or its queries and dout, take less than half of the L2 cache of an A100, H100
    // or B200.
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

  // `times`: the number of blocks per tile.
  LaunchShape shape(size_t shared_bytes, int times = 1) const {
    return {dim3(blocks, unsigned(times)), dim3(kAttentionThreads), shared_bytes};
  }
};

void check_lengths(const Tensor& k) {
  VAR_CHECK(k.size(2) < std::numeric_limits<int>::max() / 2, "k", "less than 2^30 keys", k.size(2));
}

// ---- forward ------------------------------------------------------------------------------------------------------

// The largest number of parts that the keys of a tile may be divided into. It is one if each multiprocessor has a block
// anyway; else it is such that all blocks can be resident at once. `limit`: the most keys that a tile sees.
int most_parts(const OnDevice& device, const Grid& grid, int limit) {
  const int64_t count = multiprocessors(device);
  if (grid.blocks >= count) return 1;
  return parts_of(limit, int(std::min<int64_t>(kMostParts, count * forward_blocks(grid.problem.dim) / grid.blocks)));
}

template <class T, int kDim>
void launch_parts(const OnDevice& device, const GpuAttentionForward& arguments, const Grid& grid, int most) {
  const GpuAttentionProblem& p = arguments.problem;
  Tensor sums = device.empty({most, p.pairs, p.queries, p.dim}, ScalarType::Float);
  Tensor statistics = device.empty({most, p.pairs, p.queries, 2}, ScalarType::Float);
  const AttentionParts parts = {most, sums.mutable_data_ptr<float>(),
                                reinterpret_cast<float2*>(statistics.mutable_data_ptr<float>())};
  launch(device, "block_causal_attention, parts", attention_part_kernel<T, kDim>,
         grid.shape(forward_shared_bytes(kDim), most), arguments, parts);
  launch(device, "block_causal_attention, combining parts", attention_combine_kernel<T>,
         grid.shape(0, combine_blocks(p.dim)), arguments, parts);
}

template <class T>
void launch_forward(const OnDevice& device, const GpuAttentionForward& arguments, const Grid& grid, int limit,
                    bool tensor_cores) {
  const int dim = arguments.problem.dim;
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores)
      return with_tensor_core_dim(dim, [&](auto width) {
        constexpr int kDim = decltype(width)::value;
        if (const int most = most_parts(device, grid, limit); most > 1)
          return launch_parts<T, kDim>(device, arguments, grid, most);
        launch(device, "block_causal_attention", attention_forward_kernel<T, kDim>,
               grid.shape(forward_shared_bytes(kDim)), arguments);
      });
  } else {
    if (tensor_cores)
      return with_tf32_dim(dim, [&](auto width) {
        constexpr int kDim = decltype(width)::value;
        launch(device, "block_causal_attention (3xTF32)", tf32_attention_forward_kernel<kDim>,
               grid.shape(tf32_forward_shared_bytes(kDim)), arguments);
      });
  }
  with_plain_dim(dim, [&](auto width) {
    launch(device, "block_causal_attention (plain)", plain_attention_forward_kernel<T, decltype(width)::value>,
           grid.shape(plain_forward_shared_bytes(dim)), arguments);
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Lens& scale_lens_in,
                                   double softmax_scale, int64_t q_offset, bool allow_tf32,
                                   const std::optional<Tensor>& lens) {
  const Lens scale_lens = lengths_of(scale_lens_in, lens);
  check_attention(q, k, v, scale_lens, q_offset);
  check_lengths(k);
  const OnDevice device(q);
  Tensor out = empty_as(device, q), lse = device.empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  GpuAttentionForward arguments = {rows_of(q), rows_of(k), rows_of(v), output_rows(out), lse.mutable_data_ptr<float>(),
                                0.0f, softmax_scale < 0 ? 0x80008000u : 0u, {}};
  // Never zero, because an invisible score is -inf, and -inf times zero would be NaN.
  arguments.scale_log2 = std::max(float(std::abs(softmax_scale) * 1.4426950408889634), 1e-30f);
  const bool fp32 = q.scalar_type() == ScalarType::Float;
  bool tensor_cores = (!fp32 || allow_tf32) && q.size(3) <= kMaxTensorCoreDim;
  for (const GpuHeadRows* rows : {&arguments.q, &arguments.k, &arguments.v, &arguments.out})
    tensor_cores &= chunks_fit(*rows, q.size(3), fp32 ? 4 : 8);
  const std::vector<AttentionTile> tiles =
      attention_tiles::of_queries(scale_lens, q_offset, q.size(2), tensor_cores ? kForwardRows : kPlainRows,
                                  !tensor_cores ? kPlainKeys : fp32 ? kTf32Keys : kForwardKeys);
  const Grid grid(device, q, k, scale_lens, q_offset, tiles, q.size(1), k.size(2) * k.size(1) / q.size(1));
  arguments.problem = grid.problem;
  const int limit = tiles.front().limit;  // the largest of all tiles
  with_dtype(q, [&](auto zero) { launch_forward<decltype(zero)>(device, arguments, grid, limit, tensor_cores); });
  return {out, lse};
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T>
void launch_backward(const OnDevice& device, GpuAttentionBackward arguments, const Grid& queries, const Grid& keys,
                     bool tensor_cores) {
  const int dim = queries.problem.dim;
  const auto both = [&](auto of_queries, auto of_keys, size_t queries_bytes, size_t keys_bytes) {
    arguments.problem = queries.problem;
    launch(device, "block_causal_attention backward, queries", of_queries, queries.shape(queries_bytes), arguments);
    arguments.problem = keys.problem;
    launch(device, "block_causal_attention backward, keys", of_keys, keys.shape(keys_bytes), arguments);
  };
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores)
      return with_tensor_core_dim(dim, [&](auto width) {
        constexpr int kDim = decltype(width)::value;
        both(attention_backward_queries_kernel<T, kDim>, attention_backward_keys_kernel<T, kDim>,
             backward_queries_shared_bytes(kDim), backward_keys_shared_bytes(kDim));
      });
  }
  with_plain_dim(dim, [&](auto width) {
    constexpr int kDim = decltype(width)::value;
    both(plain_attention_backward_queries_kernel<T, kDim>, plain_attention_backward_keys_kernel<T, kDim>,
         plain_backward_shared_bytes(dim), plain_backward_shared_bytes(dim));
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse_in,
                                            const std::optional<Tensor>& dlse_in, const Lens& scale_lens_in,
                                            double softmax_scale, int64_t q_offset, bool /*allow_tf32*/,
                                            const std::optional<Tensor>& lens) {
  const Lens scale_lens = lengths_of(scale_lens_in, lens);
  check_attention(q, k, v, scale_lens, q_offset);
  check_attention_tensor("dout", dout, q, q.size(1), q.size(2));
  check_attention_tensor("out", out, q, q.size(1), q.size(2));
  check_lengths(k);
  const OnDevice device(q);
  const Tensor lse = checked_statistics("lse", lse_in, q);
  const Tensor dlse = dlse_in ? checked_statistics("dlse", *dlse_in, q) : lse;
  Tensor dq = empty_as(device, q), dk = empty_as(device, k), dv = empty_as(device, v);
  if (lse.numel() == 0) {  // there is no query, so nothing depends on the keys
    if (dk.numel() > 0) torch::stable::zero_(dk), torch::stable::zero_(dv);
    return {dq, dk, dv};
  }
  Tensor delta = device.empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  const GpuAttentionBackward arguments = {
      rows_of(q), rows_of(k), rows_of(v), rows_of(out), rows_of(dout), output_rows(dq), output_rows(dk),
      output_rows(dv), lse.const_data_ptr<float>(), dlse_in ? dlse.const_data_ptr<float>() : nullptr,
      delta.mutable_data_ptr<float>(), float(softmax_scale), float(softmax_scale * 1.4426950408889634), {}};
  bool tensor_cores = q.scalar_type() != ScalarType::Float && q.size(3) <= kMaxTensorCoreDim;
  for (const GpuHeadRows* rows : {&arguments.q, &arguments.k, &arguments.v, &arguments.out, &arguments.dout,
                               &arguments.dq, &arguments.dk, &arguments.dv})
    tensor_cores &= chunks_fit(*rows, q.size(3));
  const int64_t tile = tensor_cores ? kBackwardTile : kPlainTile;
  const int64_t block_of_keys = tensor_cores ? backward_keys(int(q.size(3))) : kPlainBlock;
  const int64_t block_of_rows = tensor_cores ? backward_rows(int(q.size(3))) : kPlainBlock;
  const int64_t group = q.size(1) / k.size(1);
  const Grid queries(device, q, k, scale_lens, q_offset,
                     attention_tiles::of_queries(scale_lens, q_offset, q.size(2), tile, block_of_keys), q.size(1),
                     k.size(2) / group);
  const Grid keys(device, q, k, scale_lens, q_offset,
                  attention_tiles::of_keys(scale_lens, q_offset, q.size(2), tile, block_of_rows), k.size(1),
                  q.size(2) * group);
  with_dtype(q, [&](auto zero) { launch_backward<decltype(zero)>(device, arguments, queries, keys, tensor_cores); });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace var_kernels

VAR_CUDA_OPS(m) {
  m.impl("_block_causal_attention", TORCH_BOX(&var_kernels::forward));
  m.impl("_block_causal_attention_backward", TORCH_BOX(&var_kernels::backward));
}
