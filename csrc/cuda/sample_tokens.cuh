// Samples one token for each row of logits: guidance, top-k, top-p and the draw, without sorting. A block holds a row
// in registers. fp32 numbers are mapped to integers of the same order (keys), and both thresholds are found by
// bisection over keys. Each step counts tokens, or adds up probabilities, in one reduction over the block; there are at
// most 32 steps. The latency of the reductions is the limit. There are many rows (B·l_k), so a multiprocessor has
// several to switch between.
//
// A thread owns whole Philox counters. The four words of a counter belong to tokens that are sixteen apart, and sixteen
// neighbouring threads read 64 consecutive bytes of logits.
#pragma once
#include "../sample_tokens.h"
#include "device.cuh"

namespace var_kernels {

constexpr int kMostSampleWarps = 16;  // per block
constexpr int kKeyOfMinusInfinity = -2139095041;
constexpr int kLowestKey = -2147483647 - 1, kHighestKey = 2147483647;

// Combines one value of each thread of a block, in the order of the warps; every thread gets the result. Two buffers
// are used in turn, so a thread that is one reduction ahead writes where no other thread still reads.
struct BlockReduction {
  unsigned (*buffers)[kMostSampleWarps];
  int turn, warps;

  template <class V, class F>
  __device__ V operator()(V value, F f) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value = f(value, __shfl_xor_sync(kFullWarp, value, distance));
    V* const shared = reinterpret_cast<V*>(buffers[turn]);
    turn ^= 1;
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    V result = shared[0];
    for (int warp = 1; warp < warps; ++warp) result = f(result, shared[warp]);
    return result;
  }
  __device__ int sum(int v) {
    return (*this)(v, [](int a, int b) { return a + b; });
  }
  __device__ float sum(float v) {
    return (*this)(v, [](float a, float b) { return a + b; });
  }
  __device__ int min(int v) {
    return (*this)(v, [](int a, int b) { return a < b ? a : b; });
  }
  __device__ int max(int v) {
    return (*this)(v, [](int a, int b) { return a > b ? a : b; });
  }
  __device__ float max(float v) {
    return (*this)(v, [](float a, float b) { return a > b ? a : b; });
  }
};

__device__ __forceinline__ int key_of(float x) {  // x is not -0
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ float from_key(int key) { return __int_as_float(key ^ ((key >> 31) & 0x7fffffff)); }
__device__ __forceinline__ int middle(int low, int high) { return int((int64_t(low) + high + 1) >> 1); }  // rounded up

// The four random words of the counter (first, position, 0, 0).
__device__ __forceinline__ void philox(uint32_t first, uint32_t position, uint64_t seed, uint32_t (&x)[4]) {
  x[0] = first, x[1] = position, x[2] = x[3] = 0;
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxKey0, key1 += kPhiloxKey1) {
    const uint64_t a = uint64_t(x[0]) * kPhiloxFactor0, b = uint64_t(x[2]) * kPhiloxFactor1;
    x[0] = uint32_t(b >> 32) ^ x[1] ^ key0;
    x[2] = uint32_t(a >> 32) ^ x[3] ^ key1;
    x[1] = uint32_t(b);
    x[3] = uint32_t(a);
  }
}
__device__ __forceinline__ float exponential(uint32_t word) {
  return -log1pf(-(float(word) * 0x1p-32f + 0x1p-33f));
}

// The tokens of a thread. Element i uses word i % 4 of its counter i / 4.
template <int kCounters, int kThreads>
struct ThreadRow {
  static constexpr int kElements = 4 * kCounters;
  int keys[kElements];
  float probabilities[kElements];

  static __device__ int counter(int i) { return int(threadIdx.x) + i / 4 * kThreads; }
  static __device__ int index(int i) { return counter(i) / 16 * 64 + i % 4 * 16 + counter(i) % 16; }

  template <class F>
  __device__ int count(const F& f) const {
    int n = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) n += f(i) ? 1 : 0;
    return n;
  }
  template <class F>
  __device__ float add(const F& f) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum += f(i) ? probabilities[i] : 0.0f;
    return sum;
  }
};

// Finds the key that exactly k tokens reach, or more if several tokens equal the k-th.
template <class Row>
__device__ int top_k_key(const Row& row, BlockReduction& reduce, int64_t k, int high) {
  int low = kKeyOfMinusInfinity;
  while (low < high) {  // at least k reach `low`, fewer than k exceed `high`
    const int key = middle(low, high);
    const int count = reduce.sum(row.count([&](int i) { return row.keys[i] >= key; }));
    if (count == k) return key;
    if (count > k)
      low = key;
    else
      high = key - 1;
  }
  return low;
}

// Finds the smallest key that stays. The tokens below this key fit in the budget; those with this key do not, or it is
// the largest key. Of the tokens with this key, the first ones are dropped, as many as the budget still allows, but
// never the last one.
template <class Row>
__device__ int top_p_key(Row& row, BlockReduction& reduce, float budget, int low, int high) {
  low -= 1, high -= 1;
  while (low < high) {
    const int key = middle(low, high);
    if (reduce.sum(row.add([&](int i) { return row.keys[i] <= key; })) <= budget)
      low = key;
    else
      high = key - 1;
  }
  int next = kHighestKey;
#pragma unroll
  for (int i = 0; i < row.kElements; ++i) next = row.keys[i] > low && row.keys[i] < next ? row.keys[i] : next;
  const int border = reduce.min(next);
  const int equal = reduce.sum(row.count([&](int i) { return row.keys[i] == border; }));
  if (equal < 2) return border;
  const float left = budget - reduce.sum(row.add([&](int i) { return row.keys[i] <= low; }));
  float each = 0.0f;
#pragma unroll
  for (int i = 0; i < row.kElements; ++i) each = row.keys[i] == border ? row.probabilities[i] : each;
  each = reduce.max(each);
  const int most = int(fminf(floorf(left / each), float(equal - 1)));
  int first = 0, last = row.kElements * int(blockDim.x);  // the first `first` tokens hold at most `most` of them
  while (first < last) {
    const int end = middle(first, last);
    const auto tied_before = [&](int i) { return row.keys[i] == border && row.index(i) < end; };
    if (reduce.sum(row.count(tied_before)) <= most)
      first = end;
    else
      last = end - 1;
  }
#pragma unroll
  for (int i = 0; i < row.kElements; ++i)
    if (row.keys[i] == border && row.index(i) < first) row.keys[i] = kLowestKey;
  return border;
}

template <class T, int kCounters, int kThreads>
__global__ void __launch_bounds__(kThreads) sample_tokens_kernel(const SampleTokens a) {
  __shared__ unsigned buffers[2][kMostSampleWarps];
  BlockReduction reduce = {buffers, 0, kThreads / 32};
  ThreadRow<kCounters, kThreads> row;
  const int64_t number = blockIdx.x, sample = number / a.length, token = number % a.length;
  const auto place = [&](const Rows& rows) {
    return static_cast<const T*>(rows.data) + sample * rows.per_sample + token * rows.per_token;
  };
  const T* const conditional = place(a.conditional);
  const T* const unconditional = a.unconditional.data == nullptr ? nullptr : place(a.unconditional);
  int highest = kLowestKey;
#pragma unroll
  for (int i = 0; i < row.kElements; ++i) {
    float x = -INFINITY;
    if (const int v = row.index(i); v < a.vocab) {
      x = to_float(conditional[v]);
      if (unconditional != nullptr) x = (1.0f + a.guidance) * x - a.guidance * to_float(unconditional[v]);
      x = x == x ? x + 0.0f : -INFINITY;  // + 0.0f turns -0 into 0, whose key is different
    }
    row.keys[i] = key_of(x);
    highest = row.keys[i] > highest ? row.keys[i] : highest;
  }
  highest = reduce.max(highest);
  if (highest <= kKeyOfMinusInfinity) {
    if (threadIdx.x == 0) a.tokens[number] = 0;
    return;
  }
  int key = kKeyOfMinusInfinity + 1;
  if (a.top_k > 0) {
    const int least = top_k_key(row, reduce, a.top_k, highest);
    key = least > key ? least : key;
  }
  const float largest = from_key(highest);
#pragma unroll
  for (int i = 0; i < row.kElements; ++i)
    row.probabilities[i] = row.keys[i] >= key ? exp2f((from_key(row.keys[i]) - largest) * 1.44269504088896341f) : 0.0f;
  if (a.dropped >= 0.0f) {
    const float total = reduce.sum(row.add([](int) { return true; }));
    key = top_p_key(row, reduce, a.dropped * total, key, highest);
  }

  float best = -1.0f;
  int winner = kHighestKey;
#pragma unroll
  for (int c = 0; c < kCounters; ++c) {
    uint32_t words[4];
    if (a.noise == nullptr)
      philox(uint32_t(row.counter(4 * c)), uint32_t(a.offset + token), uint64_t(a.seeds[sample]), words);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int i = 4 * c + w, v = row.index(i);
      if (row.keys[i] < key) continue;  // past the end there is no noise either
      const float score = row.probabilities[i] / (a.noise == nullptr ? exponential(words[w]) : a.noise[number * a.vocab + v]);
      if (score > best || (score == best && v < winner)) best = score, winner = v;  // never true for NaN
    }
  }
  const float top = reduce.max(best);
  const int chosen = reduce.min(best == top && top >= 0.0f ? winner : kHighestKey);
  if (threadIdx.x == 0) a.tokens[number] = chosen == kHighestKey ? 0 : chosen;
}

}  // namespace var_kernels
