// Modulated LayerNorm, backward. With h = (x - mean)·rstd, g = dy·(1 + scale) and means over the row:
//   dx = rstd·(g - mean(g) - h·mean(g·h)) [+ dresidual],   dscale = Σ dy·h,   dshift = Σ dy,
// and in the gated form dbranch = dx·gate, dgate = Σ dx·branch. If the modulation is broadcast along the tokens, a
// second kernel adds up the workers' rows of partial sums.
#pragma once
#include "adaln_layer_norm.cuh"

namespace var_kernels {
namespace {

// Where one modulation gradient goes: straight into the output if it has a row per token, else into rows of partial
// sums.
struct GpuModulationGrad {
  void* per_token;  // (B, L, C) dense, or null
  float* partial;   // (workers of all samples, C) dense, or null
};

struct GpuAdaLnBackward {
  Rows dresidual, dy;  // (B, L, C); null data means zeros; dresidual in the gated form only
  Rows x;              // (B, L, C): what was normalised; in the gated form, the saved residual
  Rows branch, gate;   // (B, L, C) or broadcast; in the gated form only
  Rows scale;
  const float *mean, *rstd;  // (B, L) dense
  void *dx, *dbranch;        // (B, L, C) dense
  GpuModulationGrad dgate, dscale, dshift;
  Partition partition;
  int channels;
};

// Stores pack i of this token's gradient, or adds it to the worker's sum.
template <class T>
__device__ __forceinline__ void put_grad(const GpuModulationGrad& grad, float (&sum)[kPackWidth<T>], int row, int i,
                                         const float (&v)[kPackWidth<T>], int channels) {
  if (grad.per_token != nullptr) return store_pack<T>(grad.per_token, row, i, v, channels);
#pragma unroll
  for (int j = 0; j < kPackWidth<T>; ++j) sum[j] += v[j];
}

template <class T, int kPacks>
__device__ __forceinline__ void store_sum(const GpuModulationGrad& grad, const float (&sum)[kPacks][kPackWidth<T>],
                                          int worker, int channels) {
  if (grad.partial == nullptr) return;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int c = column(i, kPackWidth<T>);
    if (c >= channels) continue;
#pragma unroll
    for (int j = 0; j < kPackWidth<T>; j += 4) {
      const float four[4] = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
      ptx::store16(grad.partial + int64_t(worker) * channels + c + j, pack<float>(four));
    }
  }
}

template <class T, bool kGated, int kPacks>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_kernel(GpuAdaLnBackward a) {
  constexpr int kWidth = kPackWidth<T>;
  __shared__ float exchange[2][kMaxWarps][2];
  const Work work = my_work(a.partition);
  uint4 scale[kPacks], gate[kPacks];
  float dgate[kPacks][kWidth] = {}, dscale[kPacks][kWidth] = {}, dshift[kPacks][kWidth] = {};
  for (int token = work.begin; token < work.end; ++token) {
    const int row = work.sample * a.partition.length + token;
    const bool first = token == work.begin;
    uint4 x[kPacks], dy[kPacks], upstream[kPacks], branch[kPacks];
    load_row<T>(x, a.x, work.sample, token, a.channels);
    load_row<T>(dy, a.dy, work.sample, token, a.channels);
    if constexpr (kGated) {  // loaded early: the sums below have to be waited for
      load_row<T>(upstream, a.dresidual, work.sample, token, a.channels);
      load_row<T>(branch, a.branch, work.sample, token, a.channels);
      if (first || a.gate.per_token != 0) load_row<T>(gate, a.gate, work.sample, token, a.channels);
    }
    if (first || a.scale.per_token != 0) load_row<T>(scale, a.scale, work.sample, token, a.channels);
    const float mean = a.mean[row], rstd = a.rstd[row];

    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float h[kWidth], d[kWidth], s[kWidth];
      unpack<T>(x[i], h);
      unpack<T>(dy[i], d);
      unpack<T>(scale[i], s);
      put_grad<T>(a.dshift, dshift[i], row, i, d, a.channels);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        d[j] *= (h[j] - mean) * rstd;  // 0 in missing columns, because dy is 0 there
        sum[1] += d[j] * (1.0f + s[j]);
      }
      put_grad<T>(a.dscale, dscale[i], row, i, d, a.channels);
      unpack<T>(dy[i], d);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum[0] += d[j] * (1.0f + s[j]);
    }
    sum_over_row(sum, exchange[token & 1]);
    const float mean_g = sum[0] / float(a.channels), mean_gh = sum[1] / float(a.channels);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      float h[kWidth], d[kWidth], s[kWidth];
      unpack<T>(x[i], h);
      unpack<T>(dy[i], d);
      unpack<T>(scale[i], s);
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        d[j] = rstd * (d[j] * (1.0f + s[j]) - mean_g - (h[j] - mean) * rstd * mean_gh);
      if constexpr (kGated) {
        float u[kWidth], b[kWidth], t[kWidth];
        unpack<T>(upstream[i], u);
        unpack<T>(branch[i], b);
        unpack<T>(gate[i], t);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          d[j] += u[j];
          t[j] *= d[j];
          b[j] *= d[j];
        }
        store_pack<T>(a.dbranch, row, i, t, a.channels);
        put_grad<T>(a.dgate, dgate[i], row, i, b, a.channels);
      }
      store_pack<T>(a.dx, row, i, d, a.channels);
    }
  }
  if (work.begin == work.end) return;  // only workers after the last sample have no tokens
  store_sum<T>(a.dscale, dscale, work.worker, a.channels);
  store_sum<T>(a.dshift, dshift, work.worker, a.channels);
  if constexpr (kGated) store_sum<T>(a.dgate, dgate, work.worker, a.channels);
}

// Does for one element what put_grad and store_sum do together: it keeps the sum in the worker's row of partial sums.
template <class T>
__device__ __forceinline__ void add_grad(const GpuModulationGrad& grad, int row, int worker, int channels, int c,
                                         float v, bool first) {
  if (grad.per_token != nullptr) {
    static_cast<T*>(grad.per_token)[int64_t(row) * channels + c] = from_float<T>(v);
  } else {
    float& sum = grad.partial[int64_t(worker) * channels + c];
    sum = first ? v : sum + v;
  }
}

template <class T>
__device__ __forceinline__ float element(const Rows& rows, const T* row, int c) {
  return rows.data != nullptr ? to_float(row[c]) : 0.0f;
}

template <class T, bool kGated>
__global__ void __launch_bounds__(kPlainThreads, 1) plain_backward_kernel(GpuAdaLnBackward a) {
  __shared__ float exchange[2][kMaxWarps][2];
  const Work work = my_work(a.partition);
  const int channels = a.channels, step = int(blockDim.x);
  for (int token = work.begin; token < work.end; ++token) {
    const int row = work.sample * a.partition.length + token;
    const bool first = token == work.begin;
    const T* x = row_of<T>(a.x, work.sample, token);
    const T* dy = row_of<T>(a.dy, work.sample, token);
    const T* scale = row_of<T>(a.scale, work.sample, token);
    const float mean = a.mean[row], rstd = a.rstd[row];
    float sum[2] = {0.0f, 0.0f};
    for (int c = int(threadIdx.x); c < channels; c += step) {
      const float d = element(a.dy, dy, c), h = (to_float(x[c]) - mean) * rstd;
      const float g = d * (1.0f + to_float(scale[c]));
      sum[0] += g;
      sum[1] += g * h;
      add_grad<T>(a.dshift, row, work.worker, channels, c, d, first);
      add_grad<T>(a.dscale, row, work.worker, channels, c, d * h, first);
    }
    sum_over_row(sum, exchange[token & 1]);
    const float mean_g = sum[0] / float(channels), mean_gh = sum[1] / float(channels);
    for (int c = int(threadIdx.x); c < channels; c += step) {
      const float h = (to_float(x[c]) - mean) * rstd;
      const float g = element(a.dy, dy, c) * (1.0f + to_float(scale[c]));
      float d = rstd * (g - mean_g - h * mean_gh);
      if constexpr (kGated) {
        d += element(a.dresidual, row_of<T>(a.dresidual, work.sample, token), c);
        const float gate = to_float(row_of<T>(a.gate, work.sample, token)[c]);
        const float branch = to_float(row_of<T>(a.branch, work.sample, token)[c]);
        static_cast<T*>(a.dbranch)[int64_t(row) * channels + c] = from_float<T>(d * gate);
        add_grad<T>(a.dgate, row, work.worker, channels, c, d * branch, first);
      }
      static_cast<T*>(a.dx)[int64_t(row) * channels + c] = from_float<T>(d);
    }
  }
}

// ---- the rows of partial sums become gradients --------------------------------------------------------------------

constexpr int kSumColumns = 32, kSumSlices = 8;

struct PartialSum {
  const float* partial;  // (rows · count, C): the sums of `count` consecutive rows are one row of the output
  void* out;             // (rows, C)
  int rows, count;
};

struct PartialSums {
  PartialSum of[3];
  int channels;
};

// Eight threads share a column, and each of them adds every eighth row. Their sums are then added in order.
template <class T>
__global__ void __launch_bounds__(kSumColumns * kSumSlices) sum_partials_kernel(PartialSums a) {
  __shared__ float sums[kSumSlices][kSumColumns];
  // Selected by value, because an index would put the parameters into local memory.
  const PartialSum mine = blockIdx.z == 0 ? a.of[0] : blockIdx.z == 1 ? a.of[1] : a.of[2];
  const int c = int(blockIdx.x) * kSumColumns + int(threadIdx.x), slice = int(threadIdx.y);
  for (int row = int(blockIdx.y); row < mine.rows; row += int(gridDim.y)) {
    float sum = 0.0f;
    if (c < a.channels) {
      const float* column = mine.partial + int64_t(row) * mine.count * a.channels + c;
#pragma unroll 4
      for (int i = slice; i < mine.count; i += kSumSlices) sum += column[int64_t(i) * a.channels];
    }
    sums[slice][threadIdx.x] = sum;
    __syncthreads();
    if (slice == 0 && c < a.channels) {
#pragma unroll
      for (int i = 1; i < kSumSlices; ++i) sum += sums[i][threadIdx.x];
      static_cast<T*>(mine.out)[int64_t(row) * a.channels + c] = from_float<T>(sum);
    }
    __syncthreads();  // before the next row's sums overwrite these
  }
}

}  // namespace
}  // namespace var_kernels
