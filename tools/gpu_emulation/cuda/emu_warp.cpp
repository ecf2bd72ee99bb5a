// Warp-wide operations and asynchronous copies.
#include <cstring>

#include "emu_runtime.h"

namespace emu {
namespace {

enum Kind : int { kBarrier = 1, kBallot, kLdmatrix, kLdmatrixTrans, kMmaBf16, kMmaFp16, kMmaTf32, kShuffle };

int lane() { return current->thread & 31; }
Warp& warp() { return warps[current->thread >> 5]; }

Meeting& find_meeting(const char* name, uint32_t mask, int kind) {
  Meeting* found = nullptr;
  for (Meeting& meeting : warp().meetings) {
    if (meeting.arrived == 0) continue;
    if (meeting.mask == mask)
      found = &meeting;
    else if (meeting.mask & mask)
      fail("divergence", std::string(name) + ": lanes of one warp wait with different overlapping masks");
  }
  if (found != nullptr) return *found;
  for (Meeting& meeting : warp().meetings) {
    if (meeting.arrived != 0) continue;
    meeting.mask = mask;
    meeting.kind = kind;
    return meeting;
  }
  fail("divergence", std::string(name) + ": lanes of one warp wait at more than 4 places");
  __builtin_unreachable();
}

// Every lane of `mask` calls this with its operands. work(meeting) runs once, when all of them have arrived.
template <class Work>
__attribute__((noinline)) void meet(const char* name, int kind, uint32_t mask, void* operands, Work work) {
  ++counters.collectives;
  if (!(mask >> lane() & 1)) fail("divergence", std::string(name) + ": the calling lane is not in the mask");
  Meeting& meeting = find_meeting(name, mask, kind);
  if (meeting.kind != kind)
    fail("divergence", std::string(name) + ": lanes of one warp are at different operations of the whole warp");
  meeting.arrived |= 1u << lane();
  meeting.operands[lane()] = operands;
  if (meeting.arrived != mask) {
    wait_here(name);
    return;
  }
  work(meeting);
  meeting.arrived = 0;
  const int first = current->thread & ~31;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && i != lane()) make_ready(first + i);
}

template <class T>
T& operands_of(Meeting& meeting, int of_lane) {
  return *static_cast<T*>(meeting.operands[of_lane]);
}

struct ShuffleOperands {
  uint64_t in, out;
  int argument, width;
};

int shuffle_source(const ShuffleOperands& o, Shuffle mode, int at) {
  const int first = at & ~(o.width - 1), end = first + o.width;
  const int source = mode == Shuffle::index  ? first + (o.argument & (o.width - 1))
                     : mode == Shuffle::up   ? at - o.argument
                     : mode == Shuffle::down ? at + o.argument
                                             : at ^ o.argument;
  return source < first || source >= end ? at : source;
}

struct LdmatrixOperands {
  uint32_t* out;
  const void* row;
};

// Loads one of the four matrices. `rows` holds the addresses of its rows.
void load_matrix(Meeting& meeting, int matrix, bool trans, uintptr_t code) {
  const uint16_t* rows[8];
  int in_bank[8] = {}, worst = 0;
  Fiber* const self = current;
  for (int i = 0; i < 8; ++i) {
    const int source = matrix * 8 + i;
    rows[i] = static_cast<const uint16_t*>(operands_of<LdmatrixOperands>(meeting, source).row);
    const uintptr_t offset = uintptr_t(rows[i]) - uintptr_t(active.shared);
    if (uintptr_t(rows[i]) % 16 != 0) fail("misaligned", "ldmatrix: the address of a row is not 16-byte aligned", code);
    if (offset + 16 > active.shared_bytes)
      fail("out_of_bounds", "ldmatrix: the address of a row is not in dynamic shared memory", code);
    worst = std::max(worst, ++in_bank[offset / 16 % 8]);  // 8 groups of 4 banks
    current = &fibers[(self->thread & ~31) + source];
    access(rows[i], 16, Access::read, code);
    current = self;
  }
  counters.bank_conflicts += uint64_t(worst - 1);
  for (int i = 0; i < 32; ++i) {
    const int r = i / 4, c = i % 4 * 2;
    const uint32_t low = trans ? rows[c][r] : rows[r][c], high = trans ? rows[c + 1][r] : rows[r][c + 1];
    operands_of<LdmatrixOperands>(meeting, i).out[matrix] = low | high << 16;
  }
}

void ldmatrix(uint32_t (&r)[4], const void* row, bool trans, uintptr_t code) {
  LdmatrixOperands operands{r, row};
  meet("ldmatrix", trans ? kLdmatrixTrans : kLdmatrix, 0xffffffffu, &operands, [=](Meeting& meeting) {
    ++counters.ldmatrix;
    for (int matrix = 0; matrix < 4; ++matrix) load_matrix(meeting, matrix, trans, code);
  });
}

float widen(uint32_t bits, bool is_bf16) {
  if (is_bf16) return from_bits<float>(uint64_t(bits << 16));
  __half_raw raw;
  raw.x = uint16_t(bits);
  return __half2float(__half(raw));
}

struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// Products and sums are in fp32, in the order of k. How the hardware rounds its sums is not specified.
void multiply(Meeting& meeting, bool is_bf16) {
  float a[16][16], b[16][8], d[16][8];
  for (int i = 0; i < 32; ++i) {
    const MmaOperands& o = operands_of<MmaOperands>(meeting, i);
    const int g = i / 4, t = i % 4 * 2;
    for (int j = 0; j < 4; ++j)
      for (int half = 0; half < 2; ++half)
        a[g + j % 2 * 8][t + j / 2 * 8 + half] = widen(o.a[j] >> (16 * half) & 0xffff, is_bf16);
    for (int j = 0; j < 2; ++j)
      for (int half = 0; half < 2; ++half) b[t + j * 8 + half][g] = widen(o.b[j] >> (16 * half) & 0xffff, is_bf16);
    for (int j = 0; j < 4; ++j) d[g + j / 2 * 8][t + j % 2] = o.d[j];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4 * 2;
    for (int j = 0; j < 4; ++j) operands_of<MmaOperands>(meeting, i).d[j] = d[g + j / 2 * 8][t + j % 2];
  }
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool is_bf16) {
  MmaOperands operands{d, a, {b0, b1}};
  meet("mma.sync", is_bf16 ? kMmaBf16 : kMmaFp16, 0xffffffffu, &operands, [=](Meeting& meeting) {
    ++counters.mma;
    multiply(meeting, is_bf16);
  });
}

// The same in TF32, which uses only the upper 19 bits of its operands.
void multiply_tf32(Meeting& meeting) {
  const auto widen = [](uint32_t bits) { return from_bits<float>(bits & 0xffffe000u); };
  float a[16][8], b[8][8], d[16][8];
  for (int i = 0; i < 32; ++i) {
    const MmaOperands& o = operands_of<MmaOperands>(meeting, i);
    const int g = i / 4, t = i % 4;
    for (int j = 0; j < 4; ++j) a[g + j % 2 * 8][t + j / 2 * 4] = widen(o.a[j]);
    for (int j = 0; j < 2; ++j) b[t + j * 4][g] = widen(o.b[j]);
    for (int j = 0; j < 4; ++j) d[g + j / 2 * 8][2 * t + j % 2] = o.d[j];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 8; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int i = 0; i < 32; ++i)
    for (int j = 0; j < 4; ++j)
      operands_of<MmaOperands>(meeting, i).d[j] = d[i / 4 + j / 2 * 8][i % 4 * 2 + j % 2];
}

void copy_now(const AsyncCopy& copy) {
  if (copy.valid)
    std::memcpy(copy.dst, copy.src, 16);
  else
    std::memset(copy.dst, 0, 16);
}

void land(const AsyncCopy& copy) {
  mark_in_flight(copy.dst, 16, false);
  access(copy.dst, 16, Access::write, copy.code);
  if (settings.late_copies) copy_now(copy);
}

void check_vector(const void* p, const std::string& name, uintptr_t code, size_t bytes = 16) {
  if (uintptr_t(p) % bytes != 0)
    fail("misaligned", name + ": the address is not " + std::to_string(bytes) + "-byte aligned", code);
}

template <class T>
T load_vector(const void* p, uintptr_t code) {
  check_vector(p, "a load of " + std::to_string(sizeof(T)) + " bytes", code, sizeof(T));
  access(p, sizeof(T), Access::read, code);
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
void store_vector(void* p, T v, uintptr_t code) {
  check_vector(p, "a store of " + std::to_string(sizeof(T)) + " bytes", code, sizeof(T));
  access(p, sizeof(T), Access::write, code);
  std::memcpy(p, &v, sizeof v);
}

}  // namespace

void warp_barrier(uint32_t mask) {
  char unused;
  meet("__syncwarp", kBarrier, mask, &unused, [](Meeting&) { ++warp().epoch; });
}

uint64_t shuffle(uint32_t mask, uint64_t bits, int argument, int width, Shuffle mode) {
  ShuffleOperands operands{bits, 0, argument, width};
  meet("__shfl_sync", kShuffle + int(mode), mask, &operands, [mode](Meeting& meeting) {
    for (int i = 0; i < 32; ++i) {
      if (!(meeting.mask >> i & 1)) continue;
      ShuffleOperands& o = operands_of<ShuffleOperands>(meeting, i);
      const int source = shuffle_source(o, mode, i);
      if (!(meeting.mask >> source & 1)) fail("divergence", "__shfl_sync: reads from a lane that is not in the mask");
      o.out = operands_of<ShuffleOperands>(meeting, source).in;
    }
  });
  return operands.out;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  struct Operands {
    bool predicate;
    uint32_t out;
  } operands{predicate, 0};
  meet("__ballot_sync", kBallot, mask, &operands, [](Meeting& meeting) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i)
      if ((meeting.mask >> i & 1) && operands_of<Operands>(meeting, i).predicate) votes |= 1u << i;
    for (int i = 0; i < 32; ++i)
      if (meeting.mask >> i & 1) operands_of<Operands>(meeting, i).out = votes;
  });
  return operands.out;
}

namespace ptx {

uint4 load16(const void* p) { return load_vector<uint4>(p, EMU_CALLER); }
void store16(void* p, uint4 v) { store_vector(p, v, EMU_CALLER); }
uint2 load8(const void* p) { return load_vector<uint2>(p, EMU_CALLER); }
void store8(void* p, uint2 v) { store_vector(p, v, EMU_CALLER); }

void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, false, EMU_CALLER); }
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix(r, row, true, EMU_CALLER); }

template <>
void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(d, a, b0, b1, true);
}
template <>
void mma_m16n8k16<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma(d, a, b0, b1, false);
}

// Rounds to nearest, and halves away from zero. The unspecified bits are set, so that code which relies on them fails.
uint32_t to_tf32(float x) {
  const uint32_t bits = uint32_t(to_bits(x));
  return (std::isfinite(x) ? bits + 0x1000u : bits) | 0x1fffu;
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands operands{d, a, {b0, b1}};
  meet("mma.sync", kMmaTf32, 0xffffffffu, &operands, [](Meeting& meeting) {
    ++counters.mma;
    multiply_tf32(meeting);
  });
}

void cp_async16(void* dst, const void* src, bool valid) {
  const uintptr_t code = EMU_CALLER, offset = uintptr_t(dst) - uintptr_t(active.shared);
  ++counters.async_copies;
  check_vector(dst, "cp.async to", code);
  check_vector(src, "cp.async from", code);
  if (offset + 16 > active.shared_bytes)
    fail("out_of_bounds", "cp.async: the destination is not in dynamic shared memory", code);
  if (valid) {
    access(src, 16, Access::read, code);
    // The copy itself may happen later, when its origin is unknown. Read its first and last byte now, so that
    // AddressSanitizer checks them here.
    const volatile unsigned char* const bytes = static_cast<const unsigned char*>(src);
    (void)bytes[0], (void)bytes[15];
  }
  access(dst, 16, Access::write, code);
  mark_in_flight(dst, 16, true);
  const AsyncCopy copy{dst, src, valid, code};
  if (settings.late_copies)
    std::memset(dst, 0xFF, 16);
  else
    copy_now(copy);
  current->copies.push_back(copy);
  ++current->uncommitted;
}

void cp_async_commit() {
  current->groups.push_back(current->uncommitted);
  current->uncommitted = 0;
}

void cp_async_wait_for(int groups_in_flight) {
  Fiber& fiber = *current;
  while (int(fiber.groups.size()) > groups_in_flight) {
    const int copies = fiber.groups.front();
    for (int i = 0; i < copies; ++i) land(fiber.copies[size_t(i)]);
    fiber.groups.erase(fiber.groups.begin());
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + copies);
  }
}

}  // namespace ptx
}  // namespace emu
