// Declarations that the C++ entry of block_causal_attention (block_causal_attention.cpp) and its vector code share.
#pragma once
#include <cstdint>

namespace var_kernels {

// Query rows [begin, end) that are computed together, at most kMaxTileRows of them.
struct QueryTile {
  int64_t begin, end;
};
constexpr int64_t kMaxTileRows = 48;  // three vectors (or columns of AMX tiles) share what is read of K and V
constexpr int64_t kTileUnit = 16;     // tiles are computed in multiples of this number of rows

// A (B, H, L, D) tensor. Strides are in elements, and the last one is 1.
struct HeadRows {
  void* data;
  int64_t batch, head, row;
};

struct AttentionProblem {
  int64_t batch, heads, kv_heads, queries, keys, dim;
  float softmax_scale;
  const int64_t* visible;  // (Lq): a query row sees the keys [0, visible[row]); visible never decreases with row
  const QueryTile* tiles;  // the tiles cover all rows in order
  int64_t tile_count;
};

// One task of the forward: some query tiles of the query heads that share one key head. Units number the tiles of the
// first such head, then those of the second, and so on.
struct AttentionForwardTask {
  int64_t batch, kv_head, unit_begin, unit_end;
};
struct AttentionForwardArgs {
  AttentionProblem problem;
  HeadRows q, k, v, out;
  float* lse;  // (B, H, Lq)
};
struct AttentionForward {
  // All are indexed by dtype_index: the largest number of rows of a tile; the floats of scratch memory that a task
  // needs; the function that runs a task.
  int64_t tile_rows[3];
  int64_t (*scratch[3])(const AttentionProblem&, const AttentionForwardTask&);
  void (*run[3])(const AttentionForwardArgs&, const AttentionForwardTask&, float* scratch);
};

// One task of the backward: all queries against the keys [key_begin, key_end) of one key head.
struct AttentionBackwardTask {
  int64_t batch, kv_head, key_begin, key_end;
  float* dq_part;  // (H / Hkv, Lq, padded D): this key range's share of dq; null if the task writes dq itself
};
struct AttentionBackwardArgs {
  AttentionProblem problem;
  HeadRows dout, q, k, v, out, dq, dk, dv;
  const float* lse;   // (B, H, Lq)
  const float* dlse;  // (B, H, Lq) or null
};
struct AttentionBackward {
  // All are indexed by dtype_index. tile_rows is the largest number of rows of a tile, and tiles are computed in
  // multiples of tile_unit rows.
  int64_t tile_rows[3], tile_unit[3];
  int64_t (*scratch[3])(const AttentionProblem&, const AttentionBackwardTask&);
  int64_t (*padded_dim)(int64_t dim);  // floats of one row of dq_part
  void (*run[3])(const AttentionBackwardArgs&, const AttentionBackwardTask&, float* scratch);
  // dq[row] = the sum of `parts` shares in order, for the query rows [begin, end) of one head. `part` is the first
  // share of that head, and the next one is part_stride floats further.
  void (*sum_parts[3])(const AttentionBackwardArgs&, int64_t batch, int64_t head, int64_t begin, int64_t end,
                       const float* part, int64_t part_stride, int64_t parts);
};

}  // namespace var_kernels
