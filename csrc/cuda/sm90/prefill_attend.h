// Phase `attend` of prefill: the mask, the softmax, and the way out. No torch in here.
//
// A lane of a warp, g = lane / 4 and c = lane % 4, has the rows g and g + 8 of the warp's scores, and of every 8
// columns 2 c and 2 c + 1.
#pragma once

#include "prefill_tile.h"

namespace sinkattn::cuda {
namespace {

// softcap * tanh(x / softcap) in base 2, from 2 x / softcap in base 2, as tanh(y) = 2 / (1 + exp(-2 y)) - 1.
__device__ float capped(float score, float softcap) {
  return softcap * LOG2E * (2 * __fdividef(1, 1 + exp2_fast(-score)) - 1);
}

// Scores in base 2: with a softcap, and less slope * distance. The first key is `from[r]` behind row g + 8 r.
template <int N>
__device__ __forceinline__ void adjust(float (&x)[N], const int (&from)[2], float slope, const Prefill& p, int c) {
  if (p.softcap > 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = x[i] == -INFINITY ? x[i] : capped(x[i] * p.query_scale, p.softcap);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= p.query_scale;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float distance = float(from[r] - 2 * c);
#pragma unroll
    for (int i = 0; i < N; i += 4)
#pragma unroll
      for (int e = 0; e < 2; ++e) x[i + 2 * r + e] = fmaf(float(2 * i + e) - distance, slope, x[i + 2 * r + e]);
  }
}

// Scores of the rows g and g + 8 of the warp to weights; `fade` is what everything before is worth now. scale: what
// brings the scores into base 2.
template <int N>
__device__ __forceinline__ void soften(float (&x)[N], float (&top)[2], float (&total)[2], float (&fade)[2],
                                       const float& scale) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float high = x[2 * r];
#pragma unroll
    for (int i = 0; i < N; i += 4) high = fmaxf(high, fmaxf(x[i + 2 * r], x[i + 2 * r + 1]));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
    high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
    high = fmaxf(top[r], high * scale);
    fade[r] = exp2_fast(top[r] - high);
    top[r] = high;
    float more = 0;
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      x[i + 2 * r] = exp2_fast(fmaf(x[i + 2 * r], scale, -high));
      x[i + 2 * r + 1] = exp2_fast(fmaf(x[i + 2 * r + 1], scale, -high));
      more += x[i + 2 * r] + x[i + 2 * r + 1];
    }
    total[r] = total[r] * fade[r] + more;
  }
}

// Hides what a warp's 16 queries, from number `of_warp` of the tile on, do not see of the keys of tile n.
template <int KEYS>
__device__ __forceinline__ void mask(float (&score)[KEYS / 2], int n, const Tile<KEYS>& tile, int of_warp, int g,
                                     int c) {
  const int key = n * KEYS, query = tile.first + of_warp;
  if (key + KEYS - 1 <= query && key > query + 15 - tile.reach && key >= tile.oldest) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = query + g + 8 * r, low = max(row - tile.reach + 1, tile.oldest);
    const unsigned seen = max(row - low + 1, 0);
    const int before = low - key - 2 * c;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i += 4)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (unsigned(i * 2 + e - before) >= seen) score[i + 2 * r + e] = -INFINITY;
  }
}

template <int N>
__device__ __forceinline__ void fade_sum(float (&sum)[N], const float (&fade)[2]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) sum[i] *= fade[0], sum[i + 1] *= fade[0], sum[i + 2] *= fade[1], sum[i + 3] *= fade[1];
}

// A lane's piece of 32 dims of a row, 8 c to 8 c + 7, by way of the other lanes of the row; x: 2 c and 2 c + 1 of every
// 8 of them.
__device__ uint4 piece_of(const uint32_t (&x)[4], int c) {
  const bool odd = c & 1, high = c & 2;
  const uint32_t u = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1), v = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  const uint2 a = odd ? make_uint2(u, x[1]) : make_uint2(x[0], u);  // half of piece 0, or 1 of odd lanes, and of 2 or 3
  const uint2 b = odd ? make_uint2(v, x[3]) : make_uint2(x[2], v);
  const uint2 kept = high ? b : a, sent = high ? a : b;
  const uint2 got = make_uint2(__shfl_xor_sync(~0u, sent.x, 2), __shfl_xor_sync(~0u, sent.y, 2));
  return high ? make_uint4(got.x, got.y, kept.x, kept.y) : make_uint4(kept.x, kept.y, got.x, got.y);
}

// The warp's rows g and g + 8, times `factor`, to the output; `first` is the token of row 0.
template <typename T, int DIM, int KEYS>
__device__ __forceinline__ void put_away(const float (&sum)[DIM / 2], const float (&factor)[2], int first, int head,
                                         const Tile<KEYS>& tile, const Prefill& p, int g, int c) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = tile.padding + first + g + 8 * r;
    const int64_t row = (int64_t(tile.row) * p.tokens + token) * p.num_kv_heads * p.group + head;
    uint4* out = reinterpret_cast<uint4*>(static_cast<T*>(p.out) + row * p.head_dim);
#pragma unroll
    for (int i = 0; i < DIM; i += 32) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = (i + 8 * j) / 2 + 2 * r;
        x[j] = at < DIM / 2 ? pack<T>(sum[at] * factor[r], sum[at + 1] * factor[r]) : 0;
      }
      const uint4 piece = piece_of(x, c);
      if (token < p.tokens && i + 8 * c < p.head_dim) out[i / 8 + c] = piece;
    }
  }
}

}  // namespace
}  // namespace sinkattn::cuda
