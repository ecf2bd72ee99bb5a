// Fibers: each thread of a block is one, and they are switched by hand. Blocks run one after another.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>

#include "emu_runtime.h"

EmuIndex threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

Settings settings;
Counters counters;
std::vector<Report> reports;
Fiber* current = nullptr;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Launch active;

namespace {

// Saves the callee-saved registers and the stack pointer, and loads those of another fiber. This takes 10 ns;
// swapcontext, with its system call, takes 230 ns.
extern "C" void emu_switch(void** save, void* load);
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
.size emu_switch,.-emu_switch)");

void* host_stack_pointer;
[[maybe_unused]] void* host_fake_stack;
[[maybe_unused]] const void* host_stack_bottom;
[[maybe_unused]] size_t host_stack_size;

std::vector<int> ready;
size_t ready_head;
int finished, at_barrier;
bool failed;
uint64_t random_state;

uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return uint32_t(random_state >> 11);
}

// If `to` is null, it jumps to the host's stack.
void jump(void** save, Fiber* to) {
  ++counters.switches;
#if EMU_ASAN
  void** keep = current == nullptr ? &host_fake_stack : current->done ? nullptr : &current->fake_stack;
  __sanitizer_start_switch_fiber(keep, to ? to->stack : host_stack_bottom, to ? kStackBytes : host_stack_size);
#endif
  current = to;
  if (to != nullptr) threadIdx = to->index;
  emu_switch(save, to != nullptr ? to->stack_pointer : host_stack_pointer);
#if EMU_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(current ? current->fake_stack : host_fake_stack, &bottom, &size);
#endif
}

Fiber* next_ready() {
  if (ready_head == ready.size()) return nullptr;
  if (settings.seed == 1) {
    const int thread = ready.back();
    ready.pop_back();
    return &fibers[thread];
  }
  if (settings.seed > 1)
    std::swap(ready[ready_head + random_number() % (ready.size() - ready_head)], ready[ready_head]);
  const int thread = ready[ready_head++];
  if (ready_head == ready.size()) {
    ready.clear();
    ready_head = 0;
  }
  return &fibers[thread];
}

void run_next() {
  void* discarded;
  jump(current->done ? &discarded : &current->stack_pointer, next_ready());
}

void fiber_entry() {
#if EMU_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (host_stack_bottom == nullptr) host_stack_bottom = bottom, host_stack_size = size;
#endif
  active.call.run(active.call.call);
  if (!current->copies.empty()) note("async_copy", "a thread exits with cp.async in flight");
  for (const AsyncCopy& copy : current->copies) mark_in_flight(copy.dst, 16, false);  // reported once is enough
  current->done = true;
  current->waits_at = "exit";
  ++finished;
  if (at_barrier > 0) fail("barrier", "some threads exited while others wait at __syncthreads");
  run_next();
  std::abort();
}

void prepare(Fiber& fiber, int thread, const dim3& block) {
  if (fiber.stack == nullptr) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for the stacks of the threads");
    mprotect(memory, page, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + page;
  }
#if EMU_ASAN
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  // The stack as emu_switch expects it: six registers, then the address to go to. There the stack pointer must be 8
  // bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 3;
  *--top = reinterpret_cast<void*>(fiber_entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  const unsigned x = unsigned(thread);
  fiber.stack_pointer = top;
  fiber.index = {x % block.x, x / block.x % block.y, x / block.x / block.y};
  fiber.thread = thread;
  fiber.done = false;
  fiber.waits_at = "start";
  fiber.fake_stack = nullptr;
  fiber.copies.clear();
  fiber.groups.clear();
  fiber.uncommitted = 0;
}

void describe_deadlock() {
  std::map<std::string, int> places;
  for (int i = 0; i < active.threads; ++i) ++places[fibers[i].waits_at];
  std::string message = "no thread can go on:";
  for (const auto& [place, threads] : places) message += " " + std::to_string(threads) + " at " + place + ",";
  message.pop_back();
  fail("deadlock", message);
}

void run_block(const dim3& block) {
  active.block_epoch = ++active.epoch;
  std::fill(warps.begin(), warps.end(), Warp{});
  std::memset(active.shared, 0xFF, active.shared_bytes);  // NaN in every format
  finished = at_barrier = 0;
  ready.clear();
  ready_head = 0;
  for (int i = 0; i < active.threads; ++i) {
    prepare(fibers[i], i, block);
    ready.push_back(i);
  }
  ++counters.blocks;
  jump(&host_stack_pointer, next_ready());
  if (!failed && finished < active.threads) describe_deadlock();
}

std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  if (settings.seed == 1) std::reverse(order.begin(), order.end());
  if (settings.seed > 1)
    for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

Report& add_report(const char* kind, std::string message, uintptr_t code) {
  for (Report& old : reports) {
    if (old.kind == kind && old.code == code && (code != 0 || old.message == message)) {
      ++old.count;
      return old;
    }
  }
  Report report;
  report.kind = kind;
  report.message = std::move(message);
  report.kernel = uintptr_t(active.call.kernel);
  report.code = code;
  report.block[0] = blockIdx.x, report.block[1] = blockIdx.y, report.block[2] = blockIdx.z;
  report.thread = current != nullptr ? current->thread : -1;
  return reports.emplace_back(std::move(report));
}

}  // namespace

void note(const char* kind, std::string message, uintptr_t code, int other_thread) {
  Report& report = add_report(kind, std::move(message), code);
  if (report.count == 1) report.other_thread = other_thread;
}

void fail(const char* kind, std::string message, uintptr_t code) {
  add_report(kind, std::move(message), code);
  failed = true;
  if (current == nullptr) return;
  void* discarded;
  current->done = true;  // it is never entered again
  jump(&discarded, nullptr);
  std::abort();
}

void wait_here(const char* what) {
  Fiber* const self = current;
  self->waits_at = what;
  Fiber* const next = next_ready();
  if (next != self) jump(&self->stack_pointer, next);
}

void make_ready(int thread) { ready.push_back(thread); }

void block_barrier() {
  if (finished > 0) fail("barrier", "__syncthreads after some threads of the block have exited");
  if (++at_barrier < active.threads) {
    wait_here("__syncthreads");
    return;
  }
  at_barrier = 0;
  ++active.epoch;
  for (Warp& warp : warps) warp.epoch = 0;
  for (int i = 0; i < active.threads; ++i)
    if (i != current->thread) make_ready(i);
}

unsigned char* dynamic_shared() { return active.shared; }

cudaError_t launch(const cudaLaunchConfig_t& config, const KernelCall& call) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  active.call = call;
  failed = false;
  ++counters.launches;
  if (threads == 0 || threads > 1024 || threads % 32 != 0 || blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    fail("launch", "a block of " + std::to_string(threads) + " threads in a grid of " + std::to_string(blocks) +
                       " blocks: expected whole warps, at most 1024 threads, at least one block");
    return cudaErrorInvalidConfiguration;
  }
  if (!shared_memory_allowed(call.kernel, config.dynamicSmemBytes)) return cudaErrorInvalidValue;
  if (config.stream != current_stream()) fail("launch", "the kernel is not launched in the current stream");
  if (settings.executor) return settings.executor(config, call) ? cudaSuccess : cudaErrorLaunchFailure;
  gridDim = grid, blockDim = block;
  active.threads = int(threads);
  active.shared_bytes = config.dynamicSmemBytes;
  random_state = settings.seed * 0x9E3779B97F4A7C15ull | 1;
  if (fibers.size() < threads) fibers.resize(threads);
  warps.assign(threads / 32, Warp{});
  const size_t capacity = (active.shared_bytes + 1023) / 1024 * 1024 + 1024;
  active.shared = static_cast<unsigned char*>(std::aligned_alloc(1024, capacity));
#if EMU_ASAN
  __asan_poison_memory_region(active.shared + active.shared_bytes, capacity - active.shared_bytes);
#endif
  active.first_epoch = ++active.epoch;
  enter_launch_memory();
  for (const unsigned index : block_order(unsigned(blocks))) {
    if (failed) break;
    blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    run_block(block);
  }
  leave_launch_memory();
#if EMU_ASAN
  __asan_unpoison_memory_region(active.shared, capacity);
#endif
  std::free(active.shared);
  active.shared = nullptr;
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emu
