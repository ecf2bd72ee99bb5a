// The arithmetic limits of this machine: loops that touch nothing but registers.
//
// Compiled by peaks.py with -march=native when the benchmarks start; plain C interface, called through ctypes.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kFloats = 16;
#elif defined(__AVX__)
constexpr int kFloats = 8;
#else
constexpr int kFloats = 4;
#endif
typedef float Vector __attribute__((vector_size(kFloats * 4)));

// Latency (4 to 6 cycles) times instructions per cycle (2) of current cores is at most 12; AVX2 has 16 registers.
constexpr int kChains = 12;
// Unknown to the compiler: chains that start alike would be computed once for all.
volatile float start_values[kChains] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};

__attribute__((noinline)) float fma_loop(int64_t rounds) {
  Vector sums[kChains];
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = Vector{} + start_values[chain];
  const Vector a = Vector{} + 0.999f, b = Vector{} + 0.001f;
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = sums[chain] * a + b;
  Vector total = {};
  for (const Vector& sum : sums) total += sum;
  return total[0];
}

#if defined(__AVX512BF16__)
__attribute__((noinline)) float bf16_loop(int64_t rounds) {
  __m512 sums[kChains];
  for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_set1_ps(start_values[chain]);
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.25f), _mm512_set1_ps(0.5f));
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) sums[chain] = _mm512_dpbf16_ps(sums[chain], a, a);
  __m512 total = _mm512_setzero_ps();
  for (const __m512& sum : sums) total = _mm512_add_ps(total, sum);
  return _mm512_reduce_add_ps(total);
}
#endif

// GFLOP/s of `loop` on all threads together, from the first start to the last end. A machine that also does other work
// gives all cores at once only for moments: the best of many runs of 2 ms, shorter than a scheduler's time slice.
template <class Loop>
double best_rate(Loop loop, double flops_per_round, int threads) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [&](int64_t rounds) {
    std::vector<std::thread> workers;
    std::vector<Clock::time_point> starts(threads), ends(threads);
    std::vector<float> sink(threads);
    std::atomic<int> waiting{threads};
    for (int i = 0; i < threads; ++i)
      workers.emplace_back([&, i] {
        for (--waiting; waiting > 0;) {
        }
        starts[i] = Clock::now();
        sink[i] = loop(rounds);
        ends[i] = Clock::now();
      });
    for (std::thread& worker : workers) worker.join();
    const auto start = *std::min_element(starts.begin(), starts.end());
    return std::chrono::duration<double>(*std::max_element(ends.begin(), ends.end()) - start).count();
  };
  int64_t rounds = 1 << 12;
  while (seconds(rounds) < 0.002) rounds *= 2;
  double best = seconds(rounds);
  for (int i = 0; i < 200; ++i) best = std::min(best, seconds(rounds));
  return flops_per_round * double(rounds) * threads / best / 1e9;
}

}  // namespace

extern "C" double peak_fp32(int threads) { return best_rate(fma_loop, 2.0 * kFloats * kChains, threads); }

// 0 where the machine has no bf16 dot product.
extern "C" double peak_bf16(int threads) {
#if defined(__AVX512BF16__)
  return best_rate(bf16_loop, 2.0 * 32 * kChains, threads);
#else
  (void)threads;
  return 0.0;
#endif
}
