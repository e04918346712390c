// Phase `attend` of prefill: the mask and the softmax. No torch in here.
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

// Scores of the rows g and g + 8 of the warp to weights; `fade` is what everything before is worth now.
template <bool CAPPED, int N>
__device__ __forceinline__ void soften(float (&x)[N], float (&top)[2], float (&total)[2], float (&fade)[2],
                                       const float& scale, const Prefill& p) {
  if (CAPPED) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = x[i] == -INFINITY ? x[i] : capped(x[i] * p.query_scale, p.softcap);
  }
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
__device__ __forceinline__ void mask(float (&score)[KEYS / 2], int n, const Prefill& p, Tile tile, int of_warp, int g,
                                     int c) {
  const int key = n * KEYS, query = tile.first + of_warp;
  if (key + KEYS - 1 <= query && key > query + 15 - p.reach && key >= tile.oldest) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = query + g + 8 * r, low = max(row - p.reach + 1, tile.oldest);
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

}  // namespace
}  // namespace sinkattn::cuda
