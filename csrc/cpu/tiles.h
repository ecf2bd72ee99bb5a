// The matrix product of gemm.h on the tile registers of AMX: one instruction takes 16 rows by 16 columns of C and 32
// bf16 numbers along K.
//
// At this level gemm of Pairs needs M and N to be multiples of 16, K to be a multiple of 16 pairs, and a_k to be 1; the
// caller pads the operands. Rows of A stay as they are, and a tile of B is 16 pairs along K by 16 columns, so the
// layouts are those of gemm.h.
#pragma once
#include "gemm.h"

#if defined(__AMX_BF16__)

namespace var_kernels::VAR_ISA {

// Assembly replaces the compiler's intrinsics, which do not declare that they read memory: the compiler may move a
// store behind the tile load that needs it.
#define VAR_TILE_LOAD(tile, base, stride)                                                                        \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void*)(base)), "r"((int64_t)(stride)) : "memory")
#define VAR_TILE_STORE(tile, base, stride)                                                                  \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void*)(base)), "r"((int64_t)(stride)) : "memory")
#define VAR_TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define VAR_TILE_MULTIPLY(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// While an object of this type exists, all tile registers of the thread have 16 rows of 64 bytes. Tiles in use add 8
// KiB to every switch of the thread, so they are released at the end.
struct TileUnit {
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int i = 0; i < 8; ++i) configuration.row_bytes[i] = 64, configuration.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~TileUnit() { __asm__ volatile("tilerelease" ::); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// MT by NT tiles of C are in registers 0 to 3, those of A in 4 and 5, those of B in 6 and 7. Loading or storing a tile
// occupies the vector ports row by row, for some nine cycles (measured), while a product of tiles leaves them free. Two
// by two tiles need one load for each product, one by three need 4/3, and for a larger shape there are no registers.
template <int MT, int NT>
VAR_INLINE void tile_block(int64_t K, const Pair* a, int64_t a_row, const Pair* b, int64_t b_k, float* c, int64_t c_row,
                           bool accumulate) {
  float* low = c + 16 * c_row;
  if (accumulate) {
    VAR_TILE_LOAD(0, c, c_row * 4);
    if constexpr (NT > 1) VAR_TILE_LOAD(1, c + 16, c_row * 4);
    if constexpr (MT > 1) VAR_TILE_LOAD(2, low, c_row * 4);
    if constexpr (MT > 1 && NT > 1) VAR_TILE_LOAD(3, low + 16, c_row * 4);
  } else {
    VAR_TILE_ZERO(0);
    if constexpr (NT > 1) VAR_TILE_ZERO(1);
    if constexpr (MT > 1) VAR_TILE_ZERO(2);
    if constexpr (MT > 1 && NT > 1) VAR_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < K; k += 16) {
    VAR_TILE_LOAD(4, a + k, a_row * 4);
    VAR_TILE_LOAD(6, b + k * b_k, b_k * 4);
    VAR_TILE_MULTIPLY(0, 4, 6);
    if constexpr (NT > 1) {
      VAR_TILE_LOAD(7, b + k * b_k + 16, b_k * 4);
      VAR_TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (MT > 1) {
      VAR_TILE_LOAD(5, a + 16 * a_row + k, a_row * 4);
      VAR_TILE_MULTIPLY(2, 5, 6);
    }
    if constexpr (MT > 1 && NT > 1) VAR_TILE_MULTIPLY(3, 5, 7);
  }
  VAR_TILE_STORE(0, c, c_row * 4);
  if constexpr (NT > 1) VAR_TILE_STORE(1, c + 16, c_row * 4);
  if constexpr (MT > 1) VAR_TILE_STORE(2, low, c_row * 4);
  if constexpr (MT > 1 && NT > 1) VAR_TILE_STORE(3, low + 16, c_row * 4);
}

template <int NT>
inline void tile_strip(int64_t M, int64_t K, const Pair* a, int64_t a_row, const Pair* b, int64_t b_k, float* c,
                       int64_t c_row, bool accumulate) {
  int64_t m = 0;
  for (; m + 32 <= M; m += 32) tile_block<2, NT>(K, a + m * a_row, a_row, b, b_k, c + m * c_row, c_row, accumulate);
  if (m < M) tile_block<1, NT>(K, a + m * a_row, a_row, b, b_k, c + m * c_row, c_row, accumulate);
}

inline void gemm(int64_t M, int64_t N, int64_t K, const Pair* a, int64_t a_row, int64_t /*a_k*/, const Pair* b,
                 int64_t b_k, float* c, int64_t c_row, bool accumulate, const LinesAhead& /*ahead*/ = {}) {
  int64_t n = 0;
  for (; n + 32 <= N; n += 32) tile_strip<2>(M, K, a, a_row, b + n, b_k, c + n, c_row, accumulate);
  if (n < N) tile_strip<1>(M, K, a, a_row, b + n, b_k, c + n, c_row, accumulate);
}

}  // namespace var_kernels::VAR_ISA

#else

namespace var_kernels::VAR_ISA {
struct TileUnit {
  TileUnit() {}  // not trivial, so that the compiler does not warn about an unused object
};
}  // namespace var_kernels::VAR_ISA

#endif
