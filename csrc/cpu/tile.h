// Dot products of a few rows with many that come from memory, for attention's keys and a layer's weight.
#pragma once

#include "vec.h"

namespace sinkattn::SINKATTN_ISA {
namespace {

constexpr int64_t SOON = 4096;           // bytes from what is worked on to what is asked for again
constexpr int ROW_TILE = 4;              // rows that share the registers loaded with keys or values
constexpr int KEY_TILE = REGISTERS / 8;  // keys that do: the tile of sums fills half of the registers

// Rows that come from memory into the L2 cache while others are worked on: the values of a block while its keys are,
// the next block's keys while its values are. Processors see runs within a page coming, and blocks are hardly larger.
// They also drop what they are asked for while too much is under way, so it is asked for again a page before its turn.
template <typename T>
struct Ahead {
  const T* rows;
  int64_t stride, count;

  // What to fetch while rows [begin, end) are worked on, from dim d on: in want of rows, the last ones again.
  Ahead at(int64_t begin, int64_t end, int64_t d = 0) const {
    if (count == 0) return {};
    return {rows + lesser(begin, greater(count - (end - begin), 0)) * stride + d, stride, count};
  }
  // A line at a time, while the one at `now` is worked on. Inlined, for g++ drops calls that only prefetch.
  __attribute__((always_inline)) void fetch(int64_t row, int64_t d, const void* now) const {
    if (count == 0 || d % (64 / int64_t(sizeof(T))) != 0) return;
    __builtin_prefetch(rows + row * stride + d, 0, 2);
    __builtin_prefetch(static_cast<const char*>(now) + SOON, 0, 2);
  }
};

// f(number of rows, first row) for [begin, end) in tiles; the number is a constant of its type.
template <int N>
struct Number {
  constexpr int operator()() const { return N; }
};
template <typename F>
void for_tiles(int64_t begin, int64_t end, F f) {
  for (; begin + ROW_TILE <= end; begin += ROW_TILE) f(Number<ROW_TILE>(), begin);
  static_assert(ROW_TILE == 4);
  if (end - begin == 3) f(Number<3>(), begin);
  if (end - begin == 2) f(Number<2>(), begin);
  if (end - begin == 1) f(Number<1>(), begin);
}

// sums[r][n] = q[r] . k[n] for a tile, all but the sum of their lanes.
template <int ROWS, int COLUMNS, typename Operand, typename T, typename U>
void dot_tile(const Operand* q, int64_t q_stride, const T* k, int64_t k_stride, int64_t dim, Vec* sums,
              Ahead<U> ahead) {
  Vec sum[ROWS][COLUMNS] = {};
  for (int64_t d = 0; d < dim; d += LANES * PER_FLOAT<Operand>) {
    decltype(factors<Operand>(k)) key[COLUMNS];
    for (int n = 0; n < COLUMNS; ++n) {
      key[n] = factors<Operand>(k + n * k_stride + d);
      ahead.fetch(n, d, k + n * k_stride + d);
    }
    for (int r = 0; r < ROWS; ++r) {
      auto query = factors<Operand>(q + r * q_stride + d);
      for (int n = 0; n < COLUMNS; ++n) sum[r][n] = fma(query, key[n], sum[r][n]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < COLUMNS; ++n) sums[r * COLUMNS + n] = sum[r][n];
}

// scores[r][n] = q[r] . k[n] over dim numbers, which fill whole vectors.
template <int ROWS, typename Operand, typename T, typename U>
void dot_rows(const Operand* q, int64_t q_stride, const T* k, int64_t k_stride, int64_t dim, int64_t count,
              float* scores, int64_t scores_stride, const Ahead<U>& ahead) {
  // As many tiles of few rows as have, all in all, the sums of one full tile: LANES of them are a vector in the end.
  constexpr int TILES = ROW_TILE / ROWS, SUMS = ROW_TILE * KEY_TILE;
  static_assert(SUMS % LANES == 0);
  int64_t n = 0;
  for (; n + TILES * KEY_TILE <= count; n += TILES * KEY_TILE) {
    Vec sums[SUMS];
    float dots[SUMS];
    for (int i = TILES * ROWS * KEY_TILE; i < SUMS; ++i) sums[i] = broadcast(0);
    for (int tile = 0; tile < TILES; ++tile) {
      const int64_t at = n + tile * KEY_TILE;
      dot_tile<ROWS, KEY_TILE>(q, q_stride, k + at * k_stride, k_stride, dim, sums + tile * ROWS * KEY_TILE,
                               ahead.at(at, at + KEY_TILE));
    }
    for (int i = 0; i < SUMS; i += LANES) store(dots + i, sums_of_lanes(sums + i));
    for (int tile = 0; tile < TILES; ++tile)
      for (int r = 0; r < ROWS; ++r)
        memcpy(scores + r * scores_stride + n + tile * KEY_TILE, dots + (tile * ROWS + r) * KEY_TILE,
               KEY_TILE * sizeof(float));
  }
  for (; n < count; ++n) {
    Vec sums[ROWS];
    dot_tile<ROWS, 1>(q, q_stride, k + n * k_stride, k_stride, dim, sums, ahead.at(n, n + 1));
    for (int r = 0; r < ROWS; ++r) scores[r * scores_stride + n] = sum_lanes(sums[r]);
  }
}

}  // namespace
}  // namespace sinkattn::SINKATTN_ISA
