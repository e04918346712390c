// Products of 16 rows by AMX, for blocks of many queries. Included by attention.cpp.
//
// A product of tiles is c (16, 16) += a (16, 32) b (32, 16): a as its rows lie in memory, of b every two rows as pairs,
// b[i / 2][2 column + i % 2], and c in float32. Tiles of b, 1 KB each, are what is packed here.
#pragma once

#include "vec.h"

namespace sinkattn::SINKATTN_ISA {
namespace {

// The primary template is for operands that no tile takes. A thread multiplies while it has an object of this type.
template <typename Operand>
struct Tiles {
  static constexpr int64_t ROWS = 1;
};

#if defined(__AMX_BF16__)
template <>
struct Tiles<BF16> {
  static constexpr int64_t ROWS = 16;  // and columns of c
  static constexpr int64_t DEPTH = 32;
  static constexpr int64_t SIZE = DEPTH * ROWS;  // of a tile of b, in numbers

  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, more[15] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = 64, config.rows[tile] = ROWS;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;

  // b = k^T for `count` rows k of dim numbers, (dim / DEPTH, tiles) tiles; columns without a key are 0.
  static void pack_keys(const BF16* k, int64_t stride, int64_t dim, int64_t count, int64_t tiles, BF16* b) {
    for (int64_t n = 0; n < tiles * ROWS; n += ROWS, b += SIZE) {
      for (int64_t d = 0; d < dim; d += DEPTH) {
        __m512i keys[ROWS];
        for (int64_t i = 0; i < ROWS; ++i)
          keys[i] = n + i < count ? _mm512_loadu_si512(k + (n + i) * stride + d) : _mm512_setzero_si512();
        turn(keys);
        for (int64_t i = 0; i < ROWS; ++i) _mm512_storeu_si512(b + d / DEPTH * tiles * SIZE + i * DEPTH, keys[i]);
      }
    }
  }

  // b = v for `count` rows v of dim numbers, (depth, dim / ROWS) tiles, with columns as interleave() leaves them; rows
  // that are not there are 0.
  static void pack_values(const BF16* v, int64_t stride, int64_t dim, int64_t count, int64_t depth, BF16* b) {
    const Pairs nothing = (Pairs)_mm512_setzero_si512();
    for (int64_t n = 0; n < depth * DEPTH; n += 2) {
      BF16* to = b + n / DEPTH * (dim / ROWS) * SIZE + n % DEPTH / 2 * DEPTH;
      for (int64_t d = 0; d < dim; d += DEPTH, to += 2 * SIZE) {
        const BF16* x = v + n * stride + d;
        Pairs first, second;
        interleave(n < count ? load_pairs(x) : nothing, n + 1 < count ? load_pairs(x + stride) : nothing, first,
                   second);
        _mm512_storeu_si512(to, (__m512i)first);
        _mm512_storeu_si512(to + SIZE, (__m512i)second);
      }
    }
  }

  // c = a b, or c += a b where it ADDS, for TILES tiles side by side, DEPTH * depth numbers deep. Rows of a are
  // a_stride numbers apart, those of c c_stride; tiles of b for the next DEPTH numbers begin b_step further on.
  template <int TILES, bool ADDS>
  static void multiply(const BF16* a, int64_t a_stride, const BF16* b, int64_t b_step, int64_t depth, float* c,
                       int64_t c_stride) {
    static_assert(TILES == 2 || TILES == 4);
    constexpr int64_t ROW = 64;
    a_stride *= sizeof(BF16), c_stride *= sizeof(float);
    if (ADDS) {
      _tile_loadd(0, c, c_stride);
      _tile_loadd(1, c + ROWS, c_stride);
      if (TILES == 4) _tile_loadd(2, c + 2 * ROWS, c_stride);
      if (TILES == 4) _tile_loadd(3, c + 3 * ROWS, c_stride);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if (TILES == 4) _tile_zero(2);
      if (TILES == 4) _tile_zero(3);
    }
    for (int64_t d = 0; d < depth; ++d, a += DEPTH, b += b_step) {
      _tile_loadd(4, a, a_stride);
      _tile_loadd(5, b, ROW);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, b + SIZE, ROW);
      _tile_dpbf16ps(1, 4, 6);
      if (TILES == 2) continue;
      _tile_loadd(7, b + 2 * SIZE, ROW);
      _tile_dpbf16ps(2, 4, 7);
      _tile_loadd(5, b + 3 * SIZE, ROW);
      _tile_dpbf16ps(3, 4, 5);
    }
    _tile_stored(0, c, c_stride);
    _tile_stored(1, c + ROWS, c_stride);
    if (TILES == 4) _tile_stored(2, c + 2 * ROWS, c_stride);
    if (TILES == 4) _tile_stored(3, c + 3 * ROWS, c_stride);
  }

 private:
  // Rows of 16 pairs become columns.
  static void turn(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // x[i + j]: columns j, j + 4, j + 8 and j + 12 of rows i to i + 3
      x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
      x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
      x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
      x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {  // of rows 0 to 7 and 8 to 15: columns j and j + 8, j + 4 and j + 12
      const __m512i even = _mm512_shuffle_i32x4(x[j], x[j + 4], 0x88), odd = _mm512_shuffle_i32x4(x[j], x[j + 4], 0xdd);
      const __m512i even_on = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0x88);
      const __m512i odd_on = _mm512_shuffle_i32x4(x[j + 8], x[j + 12], 0xdd);
      y[j] = _mm512_shuffle_i32x4(even, even_on, 0x88), y[j + 8] = _mm512_shuffle_i32x4(even, even_on, 0xdd);
      y[j + 4] = _mm512_shuffle_i32x4(odd, odd_on, 0x88), y[j + 12] = _mm512_shuffle_i32x4(odd, odd_on, 0xdd);
    }
    for (int i = 0; i < 16; ++i) x[i] = y[i];
  }
};
#endif

}  // namespace
}  // namespace sinkattn::SINKATTN_ISA
