// Knows which memory kernels may touch, and which thread touched it when. This finds races, missing barriers, undefined
// values and accesses out of bounds.
//
// A kernel compiled with -fsanitize=thread announces every access by calling __tsan_*. The end of this file defines
// those functions, and ThreadSanitizer itself is not linked. Each byte has a cell that remembers its last write and its
// last read. Two accesses are ordered if one thread made both. Inside one block they are also ordered if a
// __syncthreads is between them (then their epochs differ), or if one warp made both with a __syncwarp between them.
// Blocks of one launch are never ordered.
#include <link.h>

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "emu_runtime.h"

namespace emu {
namespace {

enum Readers : uint8_t { kNone, kOneThread, kOneWarp, kManyWarps };

struct Cell {
  uint32_t write_epoch = 0, read_epoch = 0;  // 0: before any launch
  uint16_t write_thread = 0, read_thread = 0, write_warp_epoch = 0, read_warp_epoch = 0;
  uint8_t readers = kNone;
  bool atomic = false, in_flight = false, undefined = false;
};

constexpr size_t kPageBytes = 4096;

struct Page {
  Cell cells[kPageBytes];
};

enum class Space { global, shared, constant };

struct Extent {
  uintptr_t id, begin, end;
  Space space;
  std::string name;
  bool undefined = false;  // nothing was written to it before the first kernel
};

constexpr uintptr_t kDynamicShared = 1, kStaticShared = 2, kCode = 3, kParameters = 4;  // ids

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
std::vector<Extent> extents;
size_t last_extent;
uintptr_t last_page_number;
Page* last_page;

Cell* cell_of(uintptr_t address) {
  const uintptr_t number = address / kPageBytes;
  if (last_page == nullptr || number != last_page_number) {
    std::unique_ptr<Page>& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    last_page = page.get();
    last_page_number = number;
  }
  return &last_page->cells[address % kPageBytes];
}

const Extent* find_extent(uintptr_t address, size_t bytes) {
  const auto holds = [=](const Extent& e) { return address >= e.begin && address + bytes <= e.end; };
  if (last_extent < extents.size() && holds(extents[last_extent])) return &extents[last_extent];
  for (size_t i = 0; i < extents.size(); ++i) {
    if (!holds(extents[i])) continue;
    last_extent = i;
    return &extents[i];
  }
  return nullptr;
}

bool inside(uintptr_t address, const void* p, size_t bytes) {
  return address >= uintptr_t(p) && address < uintptr_t(p) + bytes;
}

bool is_builtin(uintptr_t address) {
  return inside(address, &threadIdx, sizeof threadIdx) || inside(address, &blockIdx, sizeof blockIdx) ||
         inside(address, &blockDim, sizeof blockDim) || inside(address, &gridDim, sizeof gridDim);
}

std::string place(const Extent& extent, uintptr_t address) {
  return extent.name + ", byte " + std::to_string(address - extent.begin);
}

[[gnu::cold]] void report_out_of_bounds(uintptr_t address, size_t bytes, Access kind, uintptr_t code) {
  std::string message = kind == Access::read ? "read of " : "write of ";
  message += std::to_string(bytes) + " bytes";
  const Extent* nearest = nullptr;
  uintptr_t least = 1 << 20;
  for (const Extent& e : extents) {
    const uintptr_t distance = address < e.begin ? e.begin - address : address >= e.end ? address - e.end + 1 : 0;
    if (e.space == Space::constant || distance >= least) continue;
    nearest = &e;
    least = distance;
  }
  for (const Fiber& fiber : fibers) {
    if (fiber.stack != nullptr && inside(address, fiber.stack, kStackBytes)) {
      fail("out_of_bounds", message + " in the local memory of thread " + std::to_string(fiber.thread), code);
      return;
    }
  }
  if (nearest != nullptr)
    message += " at byte " + std::to_string(int64_t(address - nearest->begin)) + " of " + nearest->name + " (" +
               std::to_string(nearest->end - nearest->begin) + " bytes)";
  fail("out_of_bounds", message, code);
}

struct Accessor {
  int thread;
  uint16_t warp_epoch;
  Access kind;
  uintptr_t code;
  bool reported = false;  // an access is reported once, not once for each of its bytes
};

void note_once(Accessor& now, const char* kind, std::string message, int other_thread = -1) {
  if (!now.reported) note(kind, std::move(message), now.code, other_thread);
  now.reported = true;
}

// Whether an earlier access by `thread`, made in `epoch` and `warp_epoch`, is ordered before this one.
bool ordered(const Accessor& now, uint32_t epoch, int thread, uint16_t warp_epoch) {
  if (epoch < active.block_epoch) return false;  // another block
  return thread == now.thread || epoch != active.epoch ||
         (thread / 32 == now.thread / 32 && warp_epoch < now.warp_epoch);
}

bool read_is_ordered(const Accessor& now, const Cell& cell) {
  if (cell.readers == kManyWarps) return cell.read_epoch >= active.block_epoch && cell.read_epoch != active.epoch;
  const int thread = cell.readers == kOneWarp && cell.read_thread == now.thread ? now.thread ^ 1 : cell.read_thread;
  return ordered(now, cell.read_epoch, thread, cell.read_warp_epoch);
}

[[gnu::cold]] void report_race(const char* what, const Extent& extent, uintptr_t address, Accessor& now, uint32_t epoch,
                               int other) {
  const bool other_block = epoch < active.block_epoch;
  note_once(now, other_block ? "cross_block_race" : "race",
            std::string(what) + " without order: " + place(extent, address), other_block ? -1 : other);
}

void record_read(Cell& cell, const Accessor& now) {
  const bool same_epoch = cell.read_epoch == active.epoch && cell.readers != kNone;
  if (!same_epoch)
    cell.readers = kOneThread;
  else if (cell.read_thread / 32 != now.thread / 32)
    cell.readers = kManyWarps;
  else if (cell.readers == kOneThread && cell.read_thread != now.thread)
    cell.readers = kOneWarp;
  cell.read_epoch = active.epoch;
  cell.read_thread = uint16_t(now.thread);
  cell.read_warp_epoch = now.warp_epoch;
}

void check_cell(Cell& cell, const Extent& extent, uintptr_t address, Accessor& now) {
  const bool reads = now.kind != Access::write, writes = now.kind != Access::read;
  // The contents of shared memory are lost at the end of a block.
  const uint32_t oldest = extent.space == Space::shared ? active.block_epoch : active.first_epoch;
  if (cell.in_flight)
    note_once(now, "in_flight", "access to the target of a cp.async in flight: " + place(extent, address));
  const bool undefined = cell.undefined || (extent.space == Space::shared && cell.write_epoch < active.block_epoch);
  if (reads && undefined) note_once(now, "undefined", "read of memory never written: " + place(extent, address));
  const bool both_atomic = now.kind == Access::atomic && cell.atomic;
  if (cell.write_epoch >= oldest && !both_atomic &&
      !ordered(now, cell.write_epoch, cell.write_thread, cell.write_warp_epoch))
    report_race(writes ? "two writes" : "a read of what another thread wrote", extent, address, now, cell.write_epoch,
                cell.write_thread);
  if (!writes) return record_read(cell, now);
  if (cell.read_epoch >= oldest && cell.readers != kNone && !both_atomic && !read_is_ordered(now, cell))
    report_race("a write to what another thread read", extent, address, now, cell.read_epoch, cell.read_thread);
  cell.write_epoch = active.epoch;
  cell.write_thread = uint16_t(now.thread);
  cell.write_warp_epoch = now.warp_epoch;
  cell.atomic = now.kind == Access::atomic;
  cell.undefined = false;
}

// The writable segment of this module holds the static __shared__ variables. Kernels may read all of its segments.
int find_segments(dl_phdr_info* info, size_t, void*) {
  const auto bounds = [info](int i) {
    const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
    return std::pair(begin, begin + info->dlpi_phdr[i].p_memsz);
  };
  bool ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto [begin, end] = bounds(i);
    ours |= info->dlpi_phdr[i].p_type == PT_LOAD && uintptr_t(&threadIdx) >= begin && uintptr_t(&threadIdx) < end;
  }
  if (!ours) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
    const auto [begin, end] = bounds(i);
    const bool writable = info->dlpi_phdr[i].p_flags & PF_W;
    extents.push_back({writable ? kStaticShared : kCode, begin, end, writable ? Space::shared : Space::constant,
                       "static __shared__ memory", false});
  }
  return 1;
}

}  // namespace

void access(const void* p, size_t bytes, Access kind, uintptr_t code) {
  if (current == nullptr || !settings.check_memory) return;
  const uintptr_t address = uintptr_t(p);
  if (inside(address, current->stack, kStackBytes) || is_builtin(address)) return;
  ++counters.accesses;
  const Extent* extent = find_extent(address, bytes);
  if (extent == nullptr) return report_out_of_bounds(address, bytes, kind, code);
  if (extent->space == Space::constant) {
    if (kind != Access::read) fail("out_of_bounds", "write to constant memory", code);
    return;
  }
  Accessor now{current->thread, warps[current->thread / 32].epoch, kind, code};
  for (size_t i = 0; i < bytes; ++i) check_cell(*cell_of(address + i), *extent, address + i, now);
}

void before_atomic(void* p, int bytes) { access(p, size_t(bytes), Access::atomic, EMU_CALLER); }

void mark_in_flight(const void* p, size_t bytes, bool in_flight) {
  if (!settings.check_memory) return;
  for (size_t i = 0; i < bytes; ++i) cell_of(uintptr_t(p) + i)->in_flight = in_flight;
}

void add_buffer(uintptr_t id, const void* p, size_t bytes, std::string name, bool undefined) {
  if ((!settings.check_memory && !settings.executor) || bytes == 0) return;
  const auto same = [id](const Extent& e) { return e.id == id; };
  if (std::any_of(extents.begin(), extents.end(), same)) return;
  extents.push_back({id, uintptr_t(p), uintptr_t(p) + bytes, Space::global, std::move(name), undefined});
  if (!settings.check_memory) return;  // an executor does not use the cells
  for (size_t i = 0; undefined && i < bytes; ++i) cell_of(uintptr_t(p) + i)->undefined = true;
}

void remove_buffer(uintptr_t id) {
  for (size_t i = 0; i < extents.size(); ++i) {
    if (extents[i].id != id) continue;
    // Host code may write to these addresses when they are allocated again.
    if (settings.check_memory)
      for (uintptr_t a = extents[i].begin; a < extents[i].end; ++a) cell_of(a)->undefined = false;
    extents.erase(extents.begin() + std::ptrdiff_t(i));
    return;
  }
}

void remove_all_buffers() {
  extents.clear();
  pages.clear();
  last_page = nullptr;
}

std::vector<Buffer> all_buffers() {
  std::vector<Buffer> buffers;
  for (const Extent& e : extents)
    if (e.space == Space::global) buffers.push_back({e.begin, e.end, e.name, e.undefined});
  return buffers;
}

void enter_launch_memory() {
  if (!settings.check_memory) return;
  dl_iterate_phdr(find_segments, nullptr);
  const uintptr_t shared = uintptr_t(active.shared), parameters = uintptr_t(active.call.call);
  extents.push_back(
      {kDynamicShared, shared, shared + active.shared_bytes, Space::shared, "dynamic shared memory", false});
  extents.push_back({kParameters, parameters, parameters + active.call.bytes, Space::constant, "", false});
  for (uintptr_t a = shared; a < shared + active.shared_bytes; ++a) *cell_of(a) = Cell{};
}

void leave_launch_memory() {
  std::erase_if(extents, [](const Extent& e) { return e.id <= kParameters; });
  last_extent = 0;
}

}  // namespace emu

// ---- functions that -fsanitize=thread calls ------------------------------------------------------------------------

using emu::Access;

extern "C" {

#define EMU_HOOKS(n)                                                                                          \
  void __tsan_read##n(void* p) { emu::access(p, n, Access::read, EMU_CALLER); }                               \
  void __tsan_write##n(void* p) { emu::access(p, n, Access::write, EMU_CALLER); }                             \
  void __tsan_unaligned_read##n(void* p) { emu::access(p, n, Access::read, EMU_CALLER); }                     \
  void __tsan_unaligned_write##n(void* p) { emu::access(p, n, Access::write, EMU_CALLER); }                   \
  void __tsan_volatile_read##n(void* p) { emu::access(p, n, Access::read, EMU_CALLER); }                      \
  void __tsan_volatile_write##n(void* p) { emu::access(p, n, Access::write, EMU_CALLER); }
EMU_HOOKS(1) EMU_HOOKS(2) EMU_HOOKS(4) EMU_HOOKS(8) EMU_HOOKS(16)

void __tsan_read_range(void* p, size_t n) { emu::access(p, n, Access::read, EMU_CALLER); }
void __tsan_write_range(void* p, size_t n) { emu::access(p, n, Access::write, EMU_CALLER); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Atomics of host code in the same file, mostly reference counts.
#define EMU_ATOMICS(bits, T)                                                                                       \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }          \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }          \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_and(volatile T* p, T v, int) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_or(volatile T* p, T v, int) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }   \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {                   \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
  }                                                                                                                \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {                     \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                 \
  }
EMU_ATOMICS(8, uint8_t) EMU_ATOMICS(16, uint16_t) EMU_ATOMICS(32, uint32_t) EMU_ATOMICS(64, uint64_t)

}  // extern "C"
