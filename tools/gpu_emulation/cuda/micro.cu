// Small kernels, some right and some with one fault each, which test the emulation itself.
// tests/emulation/test_cuda_emulation.py names the layer that must find each fault.
#include "cuda/device.cuh"

namespace var_kernels {
namespace {

constexpr int kThreads = 64;
constexpr int kSharedFloats = 64;

struct Arguments {
  const float* in;  // n floats
  float* out;       // two blocks of 64 floats
  int n;
};

// ---- order ----------------------------------------------------------------------------------------------------------

template <bool kBarrier>
__global__ void exchange_in_warp(Arguments a) {
  VAR_DYN_SMEM(memory);
  float* s = reinterpret_cast<float*>(memory);
  const int t = threadIdx.x;
  s[t] = a.in[t];
  if (kBarrier) __syncwarp();
  a.out[blockIdx.x * kThreads + t] = s[t ^ 1];
}

// Reverses twice. Without the second barrier, a slow thread reads what a fast one has overwritten.
template <bool kAfterWrite, bool kBeforeReuse>
__global__ void reverse_in_block(Arguments a) {
  VAR_DYN_SMEM(memory);
  float* s = reinterpret_cast<float*>(memory);
  const int t = threadIdx.x;
  float v = a.in[t];
  for (int round = 0; round < 2; ++round) {
    s[t] = v + 1;
    if (kAfterWrite) __syncthreads();
    v = s[kThreads - 1 - t];
    if (kBeforeReuse) __syncthreads();
  }
  a.out[blockIdx.x * kThreads + t] = v;
}

template <bool kAtomic>
__global__ void accumulate(Arguments a) {
  if (kAtomic)
    atomicAdd(&a.out[threadIdx.x], a.in[threadIdx.x]);
  else
    a.out[threadIdx.x] += a.in[threadIdx.x];
}

// ---- bounds, alignment, undefined values ----------------------------------------------------------------------------

__global__ void overrun_shared(Arguments a) {
  VAR_DYN_SMEM(memory);
  float* s = reinterpret_cast<float*>(memory);
  const int t = threadIdx.x;
  s[t == kThreads - 1 ? kSharedFloats + 1 : t] = a.in[t];
  a.out[blockIdx.x * kThreads + t] = a.in[t];
}

template <bool kStatic>
__global__ void read_unwritten(Arguments a) {
  VAR_DYN_SMEM(memory);
  __shared__ float fixed[kSharedFloats];
  float* s = kStatic ? fixed : reinterpret_cast<float*>(memory);
  const int t = threadIdx.x;
  if (t < 32) s[t] = a.in[t];
  __syncthreads();
  a.out[blockIdx.x * kThreads + t] = s[t];
}

template <bool kGuard>
__global__ void copy_ragged(Arguments a) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (!kGuard || i < a.n) a.out[i] = a.in[i];
}

template <bool kWrapper>
__global__ void misaligned_vector(Arguments a) {
  const float* p = a.in + 2;
  const uint4 v = kWrapper ? ptx::load16(p) : *reinterpret_cast<const uint4*>(p);
  a.out[blockIdx.x * kThreads + threadIdx.x] = __uint_as_float(v.x);
}

__global__ void local_memory_of_another_thread(Arguments a) {
  VAR_DYN_SMEM(memory);
  float own = a.in[threadIdx.x];
  float* volatile* shared_pointer = reinterpret_cast<float* volatile*>(memory);
  if (threadIdx.x == 0) *shared_pointer = &own;
  __syncthreads();
  a.out[blockIdx.x * kThreads + threadIdx.x] = **shared_pointer;
}

// ---- divergence -----------------------------------------------------------------------------------------------------

__global__ void conditional_barrier(Arguments a) {
  if (threadIdx.x < 40) __syncthreads();
  a.out[blockIdx.x * kThreads + threadIdx.x] = a.in[threadIdx.x];
}

__global__ void exit_before_barrier(Arguments a) {
  if (threadIdx.x >= 50) return;
  __syncthreads();
  a.out[blockIdx.x * kThreads + threadIdx.x] = a.in[threadIdx.x];
}

// A shuffle in the guarded tail of a row. It is harmless if n is a multiple of 32; else it hangs or gives garbage.
template <bool kOutsideGuard>
__global__ void shuffle_in_tail(Arguments a) {
  const int t = threadIdx.x;
  const float v = a.in[t];
  float w = kOutsideGuard ? __shfl_xor_sync(kFullWarp, v, 1) : 0.0f;
  if (t < a.n) {
    if (!kOutsideGuard) w = __shfl_xor_sync(kFullWarp, v, 1);
    a.out[blockIdx.x * kThreads + t] = w;
  }
}

__global__ void shuffle_with_ballot(Arguments a) {
  const int t = threadIdx.x;
  const unsigned odd = __ballot_sync(kFullWarp, t & 1);
  a.out[blockIdx.x * kThreads + t] = t & 1 ? __shfl_sync(odd, a.in[t], 1) : a.in[t];
}

__global__ void caller_not_in_mask(Arguments a) {
  a.out[blockIdx.x * kThreads + threadIdx.x] = __shfl_xor_sync(0xffffu, a.in[threadIdx.x], 1);
}

__global__ void source_not_in_mask(Arguments a) {
  const int t = threadIdx.x;
  float v = a.in[t];
  if (t % 32 < 16) v = __shfl_sync(0xffffu, v, 20);
  a.out[blockIdx.x * kThreads + t] = v;
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

// Four chunks of 64 floats pass through two stages of shared memory. Each thread reads data that the other warp has
// copied.
template <int kInFlight, bool kAfterWait, bool kBeforeReuse, bool kValidity>
__global__ void pipeline(Arguments a) {
  VAR_DYN_SMEM(memory);
  float* s = reinterpret_cast<float*>(memory);
  const int t = threadIdx.x;
  const auto copy = [&](int chunk) {
    const int i = chunk * kThreads + t * 4;
    if (t < kThreads / 4) ptx::cp_async16(s + chunk % 2 * kThreads + t * 4, a.in + i, !kValidity || i + 4 <= a.n);
    ptx::cp_async_commit();
  };
  constexpr int kChunks = 4;
  copy(0);
  float sum = 0;
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (chunk + 1 < kChunks)
      copy(chunk + 1);
    else
      ptx::cp_async_commit();  // so that every round has the same number of groups
    ptx::cp_async_wait<kInFlight>();
    if (kAfterWait) __syncthreads();
    sum += s[chunk % 2 * kThreads + (t ^ 33)];
    if (kBeforeReuse) __syncthreads();
  }
  a.out[blockIdx.x * kThreads + t] = sum;
}

__global__ void never_waited(Arguments a) {
  VAR_DYN_SMEM(memory);
  if (threadIdx.x < 16) ptx::cp_async16(memory + threadIdx.x * 16, a.in + threadIdx.x * 4, true);
  ptx::cp_async_commit();
  a.out[blockIdx.x * kThreads + threadIdx.x] = 0;
}

// ---- matrices -------------------------------------------------------------------------------------------------------

enum Fault { kRight, kNoSwizzle, kReadUnswizzled, kSwapped, kNotTransposed, kUnalignedRow };

// out (16×64, fp32) = a (16×64) · b (64×64), computed by one warp. a and b are bf16, row-major, and adjacent in `in`.
// Rows in shared memory have 128 bytes, so without a swizzle the 8 rows of each 8×8 matrix would begin in the same
// bank.
template <int kFault>
__global__ void multiply(Arguments arguments) {
  VAR_DYN_SMEM(memory);
  const int lane = threadIdx.x;
  const auto at = [&](int row, int chunk, bool reading) -> unsigned char* {
    const bool swizzled = kFault != kNoSwizzle && !(kFault == kReadUnswizzled && reading);
    const int place = swizzled ? chunk ^ (row & 7) : chunk;
    return memory + row * 128 + place * 16 + (kFault == kUnalignedRow && reading ? 8 : 0);
  };
  for (int i = lane; i < 80 * 8; i += 32) ptx::cp_async16(at(i / 8, i % 8, false), arguments.in + i * 4, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  float d[8][4] = {};
  for (int k = 0; k < 4; ++k) {
    uint32_t a[4], b[4];
    ptx::ldmatrix_x4(a, at(lane % 16, 2 * k + lane / 16, true));
    for (int n = 0; n < 4; ++n) {
      unsigned char* row = at(16 + k * 16 + lane % 16, 2 * n + lane / 16, true);
      if (kFault == kNotTransposed)
        ptx::ldmatrix_x4(b, row);
      else
        ptx::ldmatrix_x4_trans(b, row);
      const int first = kFault == kSwapped ? 1 : 0;
      ptx::mma_m16n8k16<bf16>(d[2 * n], a, b[first], b[1 - first]);
      ptx::mma_m16n8k16<bf16>(d[2 * n + 1], a, b[2], b[3]);
    }
  }
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i)
      arguments.out[(lane / 4 + i / 2 * 8) * 64 + n * 8 + lane % 4 * 2 + i % 2] = d[n][i];
}

// ---- by name --------------------------------------------------------------------------------------------------------

struct Entry {
  const char* name;
  void (*kernel)(Arguments);
  int blocks, threads, shared_bytes;
  bool current_stream = true;
};

constexpr int kPlain = kSharedFloats * 4, kTwoStages = 2 * kPlain, kMatrices = 80 * 128;

#define ENTRY(kernel, ...) {#kernel, kernel, __VA_ARGS__}
const Entry kEntries[] = {
    {"exchange_in_warp", exchange_in_warp<true>, 2, 64, kPlain},
    {"exchange_in_warp: no __syncwarp", exchange_in_warp<false>, 2, 64, kPlain},
    {"reverse_in_block", reverse_in_block<true, true>, 2, 64, kPlain},
    {"reverse_in_block: no barrier after the write", reverse_in_block<false, true>, 2, 64, kPlain},
    {"reverse_in_block: no barrier before the next write", reverse_in_block<true, false>, 2, 64, kPlain},
    {"accumulate", accumulate<true>, 2, 64, kPlain},
    {"accumulate: not atomic", accumulate<false>, 2, 64, kPlain},
    ENTRY(overrun_shared, 2, 64, kPlain),
    {"read_unwritten: dynamic", read_unwritten<false>, 2, 64, kPlain},
    {"read_unwritten: static", read_unwritten<true>, 2, 64, kPlain},
    {"copy_ragged", copy_ragged<true>, 2, 64, kPlain},
    {"copy_ragged: no guard", copy_ragged<false>, 2, 64, kPlain},
    {"misaligned_vector: wrapper", misaligned_vector<true>, 2, 64, kPlain},
    {"misaligned_vector: plain", misaligned_vector<false>, 2, 64, kPlain},
    ENTRY(local_memory_of_another_thread, 2, 64, kPlain),
    ENTRY(conditional_barrier, 2, 64, kPlain),
    ENTRY(exit_before_barrier, 2, 64, kPlain),
    {"shuffle_in_tail", shuffle_in_tail<true>, 2, 64, kPlain},
    {"shuffle_in_tail: inside the guard", shuffle_in_tail<false>, 2, 64, kPlain},
    ENTRY(shuffle_with_ballot, 2, 64, kPlain),
    ENTRY(caller_not_in_mask, 2, 64, kPlain),
    ENTRY(source_not_in_mask, 2, 64, kPlain),
    {"pipeline", pipeline<1, true, true, true>, 1, 64, kTwoStages},
    {"pipeline: waits for too little", pipeline<2, true, true, true>, 1, 64, kTwoStages},
    {"pipeline: no barrier after the wait", pipeline<1, false, true, true>, 1, 64, kTwoStages},
    {"pipeline: no barrier before the next copy", pipeline<1, true, false, true>, 1, 64, kTwoStages},
    {"pipeline: copies past the end", pipeline<1, true, true, false>, 1, 64, kTwoStages},
    ENTRY(never_waited, 2, 64, kPlain),
    {"multiply", multiply<kRight>, 1, 32, kMatrices},
    {"multiply: no swizzle", multiply<kNoSwizzle>, 1, 32, kMatrices},
    {"multiply: reads without the swizzle", multiply<kReadUnswizzled>, 1, 32, kMatrices},
    {"multiply: fragment registers swapped", multiply<kSwapped>, 1, 32, kMatrices},
    {"multiply: not transposed", multiply<kNotTransposed>, 1, 32, kMatrices},
    {"multiply: rows not aligned", multiply<kUnalignedRow>, 1, 32, kMatrices},
    {"launch: half a warp", accumulate<true>, 1, 48, kPlain},
    {"launch: not in the current stream", accumulate<true>, 2, 64, kPlain, false},
    {"launch: more shared memory than asked for", accumulate<true>, 1, 64, 64 << 10},
};
#undef ENTRY

}  // namespace
}  // namespace var_kernels

// Runs a kernel by name. Returns the error of its launch, or -1 for an unknown name.
extern "C" __attribute__((visibility("default"))) int run_micro_kernel(const char* name, const float* in, float* out,
                                                                       int n) {
  for (const var_kernels::Entry& entry : var_kernels::kEntries) {
    if (std::strcmp(entry.name, name) != 0) continue;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(entry.blocks);
    config.blockDim = dim3(entry.threads);
    config.dynamicSmemBytes = entry.shared_bytes;
    config.stream = entry.current_stream ? static_cast<cudaStream_t>(emu::current_stream()) : nullptr;
    return cudaLaunchKernelEx(&config, entry.kernel, var_kernels::Arguments{in, out, n});
  }
  return -1;
}
