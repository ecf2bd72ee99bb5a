// The arithmetic limits of this machine: loops that touch nothing but registers.
//
// peaks.py compiles this file with -march=native when the benchmarks start, and calls its C interface through ctypes.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES
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

// On current cores latency (4 to 6 cycles) times instructions per cycle (2) is at most 12, and AVX2 has 16 registers.
constexpr int kChains = 12;
// The compiler must not know these values: it would compute chains that start alike only once.
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

#if defined(HAS_TILES)
// Six chains hide the latency (52 cycles, with one instruction in 16 cycles). Two registers hold the operands, all
// zeros.
__attribute__((noinline)) float tile_loop(int64_t rounds) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  __asm__ volatile("ldtilecfg %0" ::"m"(configuration));  // also clears the registers
  for (int64_t round = 0; round < rounds; ++round)
    __asm__ volatile(
        "tdpbf16ps %%tmm7, %%tmm6, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm1\n\t"
        "tdpbf16ps %%tmm7, %%tmm6, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm3\n\t"
        "tdpbf16ps %%tmm7, %%tmm6, %%tmm4\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm5" ::);
  __asm__ volatile("tilerelease" ::);
  return 0.0f;
}
#endif

// GFLOP/s of `loop` on all threads together, from the first start to the last end. A machine that also does other work
// has all cores free only for moments, so this takes the best of many runs of 2 ms, which is shorter than a time slice
// of the scheduler.
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

// GFLOP/s of the faster of the two instructions that multiply bf16; 0 if the machine has neither.
extern "C" double peak_bf16(int threads) {
  double best = 0.0;
#if defined(__AVX512BF16__)
  best = best_rate(bf16_loop, 2.0 * 32 * kChains, threads);
#endif
#if defined(HAS_TILES)
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  if (syscall(SYS_arch_prctl, kRequest, kTileData) == 0)
    best = std::max(best, best_rate(tile_loop, 6 * 2.0 * 16 * 16 * 32, threads));
#endif
  (void)threads;
  return best;
}
