// The C++ entry of block_causal_attention on CPUs: checks, allocation, the query tiles, and the split into tasks.
#include "block_causal_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../block_causal_attention_checks.h"
#include "dispatch.h"

namespace var_kernels {

VAR_DECLARE_ISA_TABLES(AttentionForward, attention_forward)
VAR_DECLARE_ISA_TABLES(AttentionBackward, attention_backward)

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Lens = std::vector<int64_t>;

HeadRows rows_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// empty_like(x); for a contiguous x without the operator's lookup by name.
Tensor empty_as(const Tensor& x) {
  const int64_t row = x.size(3), head = x.size(2) * row, batch = x.size(1) * head;
  if (x.numel() > 0 && x.stride(0) == batch && x.stride(1) == head && x.stride(2) == row && x.stride(3) == 1)
    return empty_cpu({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  return torch::stable::empty_like(x);
}

// Divides the query rows into tiles. Tiles begin where scales begin, so that the rows of a tile see the same keys and
// no element is masked. Only scales with fewer rows than half a tile share one: its rows then see different numbers of
// keys, which differ by at most 47.
std::vector<QueryTile> query_tiles(const Lens& lens, int64_t first, int64_t count, int64_t max_rows, int64_t unit) {
  std::vector<QueryTile> tiles;
  bool open = false;  // whether the last tile may take the next small scale
  int64_t scale_begin = 0;
  for (const int64_t length : lens) {
    const int64_t begin = std::max(scale_begin - first, int64_t{0});
    const int64_t end = std::min(scale_begin + length - first, count);
    scale_begin += length;
    const int64_t rows = end - begin;
    if (rows <= 0) continue;
    if (rows < max_rows / 2) {
      if (open && end - tiles.back().begin <= max_rows)
        tiles.back().end = end;
      else
        tiles.push_back({begin, end});
      open = true;
      continue;
    }
    // Tiles get about equally many units: 100 rows become 32 + 32 + 36 and not 48 + 48 + 4, which reads all keys for 4
    // rows.
    const int64_t units = ceil_div(rows, unit), most = max_rows / unit;
    const int64_t parts = ceil_div(units, most);
    for (int64_t part = 0, row = begin; part < parts; ++part) {
      const int64_t tile_end = std::min(begin + units * (part + 1) / parts * unit, end);
      tiles.push_back({row, tile_end});
      row = tile_end;
    }
    open = false;
  }
  return tiles;
}

// The number of keys that each query row sees, which is the end of its scale.
std::vector<int64_t> visible_keys(const Lens& lens, int64_t first, int64_t count) {
  std::vector<int64_t> visible;
  visible.reserve(count);
  int64_t end = 0;
  for (const int64_t length : lens) {
    end += length;
    for (int64_t row = visible.size(); row < std::min(end - first, count); ++row) visible.push_back(end);
  }
  return visible;
}

// The problem, and the memory that its pointers refer to.
struct Plan {
  std::vector<int64_t> visible;
  std::vector<QueryTile> tiles;
  AttentionProblem problem;
};

Plan make_plan(const Tensor& q, const Tensor& k, const Lens& lens, double softmax_scale, int64_t q_offset,
               int64_t tile_rows, int64_t tile_unit) {
  const int64_t heads = q.size(1), queries = q.size(2), dim = q.size(3), kv_heads = k.size(1), keys = k.size(2);
  Plan plan{visible_keys(lens, q_offset, queries), query_tiles(lens, q_offset, queries, tile_rows, tile_unit), {}};
  plan.problem = {q.size(0), heads, kv_heads, queries, keys, dim, float(softmax_scale), plan.visible.data(),
                  plan.tiles.data(), int64_t(plan.tiles.size())};
  return plan;
}

// Every key head is split into as many tasks as the threads need. A task has consecutive query tiles, and tasks have
// about equal work. Each task packs K and V for itself, and the result of a row does not depend on the split.
std::vector<AttentionForwardTask> forward_tasks(const AttentionProblem& p) {
  const int64_t pairs = p.batch * p.kv_heads, units = p.heads / p.kv_heads * p.tile_count;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = threads == 1 || pairs >= 4 * threads ? 1 : ceil_div(4 * threads, std::max<int64_t>(pairs, 1));
  const int64_t parts = std::min(wanted, units);
  std::vector<int64_t> work(units + 1, 0);
  for (int64_t unit = 0; unit < units; ++unit) {
    const QueryTile tile = p.tiles[unit % p.tile_count];
    work[unit + 1] = work[unit] + (tile.end - tile.begin) * p.visible[tile.end - 1];
  }
  std::vector<AttentionForwardTask> tasks;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    int64_t begin = 0;
    for (int64_t part = 1; part <= parts; ++part) {
      int64_t end = begin;
      while (end < units && work[end] < work[units] * part / parts) ++end;
      if (end > begin) tasks.push_back({pair / p.kv_heads, pair % p.kv_heads, begin, end});
      begin = end;
    }
  }
  return tasks;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Lens& scale_lens_in,
                                   double softmax_scale, int64_t q_offset, bool /*allow_tf32*/,
                                   const std::optional<Tensor>& lens) {
  const Lens scale_lens = lengths_of(scale_lens_in, lens);
  check_attention(q, k, v, scale_lens, q_offset);
  const AttentionForward& kernels = attention_forward();
  const int type = dtype_index("q", q);
  const Plan plan = make_plan(q, k, scale_lens, softmax_scale, q_offset, kernels.tile_rows[type], kTileUnit);
  const AttentionProblem& p = plan.problem;
  Tensor out = empty_as(q), lse = empty_cpu({p.batch, p.heads, p.queries}, ScalarType::Float);
  const AttentionForwardArgs args{p, rows_of(q), rows_of(k), rows_of(v), rows_of(out),
                                  static_cast<float*>(lse.mutable_data_ptr())};
  const auto run = kernels.run[type];
  const std::vector<AttentionForwardTask> tasks = forward_tasks(p);
  parallel_tasks(tasks.size(), [&](int64_t i) { run(args, tasks[i], thread_scratch(kernels.scratch[type](p, tasks[i]))); });
  return {out, lse};
}

// The number of key ranges in the backward. It depends on the shapes alone, so that dQ is the sum of the same shares
// for every number of threads.
int64_t key_ranges(const AttentionProblem& p) {
  constexpr int64_t wanted_tasks = 32, least_keys = 128;
  const int64_t pairs = std::max<int64_t>(p.batch * p.kv_heads, 1);
  return std::max<int64_t>(1, std::min(ceil_div(wanted_tasks, pairs), p.keys / least_keys));
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& out, const Tensor& lse, const std::optional<Tensor>& dlse,
                                            const Lens& scale_lens_in, double softmax_scale, int64_t q_offset,
                                            bool /*allow_tf32*/, const std::optional<Tensor>& lens) {
  const Lens scale_lens = lengths_of(scale_lens_in, lens);
  check_attention(q, k, v, scale_lens, q_offset);
  check_attention_tensor("dout", dout, q, q.size(1), q.size(2));
  check_attention_tensor("out", out, q, q.size(1), q.size(2));
  const Tensor dense_lse = checked_statistics("lse", lse, q);
  const Tensor dense_dlse = dlse ? checked_statistics("dlse", *dlse, q) : dense_lse;
  const AttentionBackward& kernels = attention_backward();
  const int type = dtype_index("q", q);
  const Plan plan =
      make_plan(q, k, scale_lens, softmax_scale, q_offset, kernels.tile_rows[type], kernels.tile_unit[type]);
  const AttentionProblem& p = plan.problem;
  Tensor dq = empty_as(q), dk = empty_as(k), dv = empty_as(v);
  const AttentionBackwardArgs args{
      p, rows_of(dout), rows_of(q), rows_of(k), rows_of(v), rows_of(out), rows_of(dq), rows_of(dk), rows_of(dv),
      static_cast<const float*>(dense_lse.const_data_ptr()),
      dlse ? static_cast<const float*>(dense_dlse.const_data_ptr()) : nullptr};

  const int64_t ranges = key_ranges(p), pairs = p.batch * p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t head_floats = p.queries * kernels.padded_dim(p.dim), share_floats = group * head_floats;
  const bool shares = ranges > 1;
  Tensor parts = empty_cpu({shares ? pairs * ranges * share_floats : 0}, ScalarType::Float);
  float* part = static_cast<float*>(parts.mutable_data_ptr());
  // The ranges are equal and have whole steps of 64 keys. All queries see the first keys, so the first range has the
  // most work and comes first.
  const int64_t step = (p.keys + ranges * 64 - 1) / (ranges * 64) * 64;
  parallel_tasks(pairs * ranges, [&](int64_t i) {
    const int64_t pair = i % pairs, range = i / pairs;
    const AttentionBackwardTask task{pair / p.kv_heads, pair % p.kv_heads, std::min(range * step, p.keys),
                                     std::min((range + 1) * step, p.keys),
                                     shares ? part + (pair * ranges + range) * share_floats : nullptr};
    kernels.run[type](args, task, thread_scratch(kernels.scratch[type](p, task)));
  });
  if (shares) {
    constexpr int64_t chunk = 64;
    const int64_t chunks = ceil_div(p.queries, chunk);
    parallel_tasks(p.batch * p.heads * chunks, [&](int64_t i) {
      const int64_t begin = i % chunks * chunk, head = i / chunks % p.heads, batch = i / chunks / p.heads;
      const int64_t pair = batch * p.kv_heads + head / group;
      kernels.sum_parts[type](args, batch, head, begin, std::min(begin + chunk, p.queries),
                              part + pair * ranges * share_floats + head % group * head_floats, share_floats, ranges);
    });
  }
  return {dq, dk, dv};
}

}  // namespace
}  // namespace var_kernels

STABLE_TORCH_LIBRARY_IMPL(var_kernels, CPU, m) {
  m.impl("_block_causal_attention", TORCH_BOX(&var_kernels::forward));
  m.impl("_block_causal_attention_backward", TORCH_BOX(&var_kernels::backward));
}
