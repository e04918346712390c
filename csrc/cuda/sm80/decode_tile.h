// Phase `fetch` of decode: tiles of the cache into shared memory. No torch in here.
#pragma once

#include "../decode.h"
#include "../numbers.h"
#include "instructions.h"

namespace sinkattn::cuda {
namespace {

// A tile is 16 rows of keys and 16 of values, in pieces of 16 bytes. Its columns are 8 pieces wide, and their rows are
// swizzled. Which row is number n in a product is free: with g = lane / 4 and c = lane % 4, a lane takes pieces 4 s + c of
// key number g (and g + 8), and pieces 8 j + g of values number 2 c, 2 c + 1 (and 8 more), and `row_of` is such that 8
// lanes, which read at a time, meet 32 different banks.
__device__ int row_of(int n) { return (n & 8) | ((n >> 2 ^ n) & 1) << 2 | (n & 2) | (n >> 2 & 1); }

template <int DIM>
struct Rows {
  static constexpr int PIECES = DIM / 8, COLUMNS = (DIM + 63) / 64, COLUMN = KEYS * 8, SIZE = COLUMNS * COLUMN;
  __device__ static int place(int row, int piece) { return piece / 8 * COLUMN + row * 8 + (piece % 8 ^ row % 8); }
};

// Large blocks come in clusters and have a multiprocessor each. Of small ones two share one, and while one of them
// starts or ends the other keeps the memory busy.
template <int HEAD_DIM, int V_DIM, bool LARGE>
struct Shape {
  static constexpr int WARPS = LARGE ? 8 : 4, THREADS = WARPS * 32;
  static constexpr int K_STEPS = (HEAD_DIM + 31) / 32, V_STEPS = (V_DIM + 63) / 64;
  static constexpr int TILE = Rows<HEAD_DIM>::SIZE + Rows<V_DIM>::SIZE;  // pieces, as all that follows
  // Tiles in flight per warp. With more, asking for them takes longer than they do.
  static constexpr int STAGES = LARGE ? (TILE <= 256 ? 4 : TILE <= 768 ? 2 : 1) : TILE <= 256 ? 6 : 3;
  static constexpr int WARP = STAGES * TILE, BLOCK = WARPS * WARP;
  static constexpr int QUERIES = K_STEPS * 64;  // of one angle: step, lane, (head g | its remainder or head g + 8)
};

// KEYS rows from slot `first` on, by a warp; those past the last slot are left out.
template <int DIM, typename T>
__device__ __forceinline__ void copy_rows(const T* x, int64_t stride, int first, int slots, int lane, uint4* place) {
  using R = Rows<DIM>;
  if (first + KEYS <= slots) {
    x += (first + lane / R::PIECES) * stride + lane % R::PIECES * 8;
#pragma unroll
    for (int i = 0; i < KEYS * R::PIECES / 32; ++i) {
      const int before = i * 32 / R::PIECES, r = (lane + i * 32) / R::PIECES, piece = (lane + i * 32) % R::PIECES;
      if (32 % R::PIECES == 0)  // the same piece of rows further down
        copy_async(place + R::place(r, piece), x + before * stride);
      else
        copy_async(place + R::place(r, piece), x + (r - lane / R::PIECES) * stride + (piece - lane % R::PIECES) * 8);
    }
  } else {
#pragma unroll 1
    for (int i = lane; i < KEYS * R::PIECES; i += 32) {
      const int r = i / R::PIECES, piece = i % R::PIECES;
      if (first + r < slots) copy_async(place + R::place(r, piece), x + (first + r) * stride + piece * 8);
    }
  }
}

}  // namespace
}  // namespace sinkattn::cuda
