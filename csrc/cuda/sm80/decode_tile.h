// Phase `fetch` of decode: tiles of the cache into shared memory. No torch in here.
#pragma once

#include "../decode.h"
#include "../eight_bits.h"
#include "instructions.h"

namespace sinkattn::cuda {
namespace {

// A tile is 16 rows of keys and 16 of values, in pieces of 16 bytes. Its columns are 8 pieces wide, and their rows are
// swizzled. A lane takes 8 numbers at a time, an eight, which is a piece, or half of one in 8 bits. Which row is number n
// in a product is free: with g = lane / 4 and c = lane % 4, a lane takes eights 4 s + c of key number g (and g + 8), and
// eights 8 j + g of values number 2 c, 2 c + 1 (and 8 more), and `row_of` is such that the lanes that read at a time, 8,
// or 16 in 8 bits, meet 32 different banks.
__device__ int row_of(int n) { return (n & 8) | ((n >> 2 ^ n) & 1) << 2 | (n & 2) | (n >> 2 & 1); }

// Of numbers of so many bytes.
template <int DIM, int BYTES>
struct Rows {
  static constexpr int NUMBERS = 16 / BYTES;  // of a piece
  static constexpr int PIECES = DIM / NUMBERS, COLUMNS = (PIECES + 7) / 8, COLUMN = KEYS * 8, SIZE = COLUMNS * COLUMN;
  __device__ static int place(int row, int piece) { return piece / 8 * COLUMN + row * 8 + (piece % 8 ^ row % 8); }

  using Eight = std::conditional_t<BYTES == 1, uint2, uint4>;
  static constexpr int EIGHTS = NUMBERS / 8, LINE = 8 * EIGHTS;  // of a piece, and of a row of a column
  __device__ static int eight(int row, int n) { return place(row, n / EIGHTS) * EIGHTS + n % EIGHTS; }
};

// Large blocks come in clusters and have a multiprocessor each. Of small ones two share one, or in 8 bits as many as its
// registers allow: while one of them starts or ends, or makes 16 bits of 8, the others keep the memory busy. C: what the
// cache holds.
template <typename C, int HEAD_DIM, int V_DIM, bool WIDE, bool LARGE>
struct Shape {
  static constexpr int WARPS = LARGE ? 8 : 4, THREADS = WARPS * 32;
  static constexpr int BLOCKS = LARGE ? 1 : !IN_8_BITS<C> || HEAD_DIM > 128 ? 2 : std::is_same_v<C, int8_t> ? 4 : 3;  // of a multiprocessor
  static constexpr int K_STEPS = (HEAD_DIM + 31) / 32, V_STEPS = (V_DIM + 63) / 64;
  // Pieces, as all that follows: keys and values, then the scales of both.
  static constexpr int ROWS = Rows<HEAD_DIM, sizeof(C)>::SIZE + Rows<V_DIM, sizeof(C)>::SIZE;
  static constexpr int TILE = ROWS + (IN_8_BITS<C> ? 2 * KEYS / 4 : 0);
  // Tiles in flight per warp. With more, asking for them takes longer than they do.
  static constexpr int STAGES =
      LARGE ? (ROWS <= 256 ? 4 : ROWS <= 768 ? 2 : 1) : BLOCKS > 3 ? 2 : ROWS <= 256 && !IN_8_BITS<C> ? 6 : 3;
  static constexpr int WARP = STAGES * TILE, BLOCK = WARPS * WARP;
  // Queries of one angle: step, (head g | its remainder or head g + 8), lane; in 8 bits a row for each head, and then what
  // the heads of both angles are to be multiplied by.
  static constexpr int QUERY_ROW = HEAD_DIM / 4 + 1;  // lanes that read two rows at a time meet 32 banks
  static constexpr int QUERIES = IN_8_BITS<C> ? (WIDE ? 16 : 8) * QUERY_ROW : K_STEPS * 64;
  static constexpr int UNITS = IN_8_BITS<C> ? 2 * MAX_GROUP / 4 : 0;
  static_assert(WARP * 16 >= MAX_GROUP * V_DIM * 4, "what a warp finds takes the place of its tiles");
};

// KEYS rows from slot `first` on, by a warp; those past the last slot are left out. mine: what a lane copies of slot 0.
template <int DIM, typename C>
__device__ __forceinline__ void copy_rows(const C* x, const C* mine, int64_t stride, int first, int slots, int lane,
                                          uint4* place) {
  using R = Rows<DIM, sizeof(C)>;
  if (first + KEYS <= slots && 32 % R::PIECES == 0) {  // a lane has the same piece of rows further down
    mine += first * stride;
    const int at = R::place(lane / R::PIECES, lane % R::PIECES);
#pragma unroll
    for (int before = 0; before < KEYS; before += 32 / R::PIECES)  // what is swizzled turns by as much
      copy_async(place + (at ^ before % 8) + before * 8, mine + before * stride);
  } else {
#pragma unroll 1
    for (int i = lane; i < KEYS * R::PIECES; i += 32) {
      const int r = i / R::PIECES, piece = i % R::PIECES;
      if (first + r < slots) copy_async(place + R::place(r, piece), x + (first + r) * stride + piece * R::NUMBERS);
    }
  }
}

}  // namespace
}  // namespace sinkattn::cuda
