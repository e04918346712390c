// Phase `attend` of decode: what is seen, the mask, the softmax. No torch in here.
//
// A lane of a warp, g = lane / 4 and c = lane % 4, has the rows g (and g + 8) of products: query heads, or one head and
// what rounding left of it. ROWS is how many softmax rows that makes: 1, or 2 of a group of more than 8.
#pragma once

#include "decode_tile.h"

namespace sinkattn::cuda {
namespace {

// Two numbers in a register, the first in the low half.
template <typename T>
__device__ uint32_t pack(T low, T high) {
  return uint32_t(reinterpret_cast<uint16_t&>(low)) | uint32_t(reinterpret_cast<uint16_t&>(high)) << 16;
}

// softcap * tanh(x / softcap) in base 2, from 2 x / softcap in base 2, as tanh(y) = 2 / (1 + exp(-2 y)) - 1.
__device__ float capped(float score, float softcap) {
  return softcap > 0 ? softcap * LOG2E * (2 / (1 + exp2_fast(-score)) - 1) : score;
}

// What a token sees, of the position t that it stands at.
struct Seen {
  int slots, new_slot;
  int reach;  // ages of the ring, which count from the token, 0, back around the ring
  int sinks;  // that there are
  int from;   // where the sinks see the query

  __device__ Seen() {}
  __device__ Seen(const Call& p, int64_t t) : slots(p.sink_size + p.ring_size) {
    const bool in_ring = t >= p.sink_size;
    const int64_t written = t - p.sink_size;
    const int ring_slot = written >> 31 ? int(written % p.ring_size) : int(written) % p.ring_size;  // 64 bits take long
    new_slot = in_ring ? p.sink_size + ring_slot : int(t);
    reach = in_ring ? int(min(int64_t(p.window_size), written + 1)) : -slots;
    sinks = int(min(int64_t(p.sink_size), t + 1));
    from = int(min(t, int64_t(p.sink_size + p.window_size - 1)));
  }
  __device__ int age_of(int slot, int ring_size) const { return new_slot - slot + (slot > new_slot ? ring_size : 0); }
  __device__ bool hides(int slot, int age, bool is_sink) const {
    return is_sink ? slot >= sinks : age >= reach || slot >= slots;
  }
};

// Caps scores, takes ALiBi's share off them, and hides what is not visible. seen: of each softmax row, or of all (SEEN
// 1). hidden: what none of them sees, by `any`.
template <int ROWS, int SEEN>
__device__ __forceinline__ void mask(float (&x)[ROWS][2][2], bool (&hidden)[2][2], const float (&slope)[ROWS],
                                     const Params& p, const Seen (&seen)[SEEN], const Seen& any, int first, int c) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int slot = first + row_of(j * 8 + c * 2 + e);
      const bool is_sink = slot < p.sink_size;
      hidden[j][e] = any.hides(slot, any.age_of(slot, p.ring_size), is_sink);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const Seen& by = seen[SEEN > 1 ? r : 0];
        const int age = by.age_of(slot, p.ring_size);
        float& y = x[r][j][e];
        if (p.softcap > 0) y = capped(y, p.softcap);
        if (p.alibi_slopes) y -= slope[r] * float(is_sink ? by.from - slot : age);
        if (SEEN > 1 ? by.hides(slot, age, is_sink) : hidden[j][e]) y = -INFINITY;
      }
    }
  }
}

// One step of the online softmax: scores to weights. A lane sums the weights of its own keys.
template <typename T, int ROWS, int N>
__device__ __forceinline__ void soften(const float (&x)[ROWS][2][2], uint32_t (&weights)[4], float (&top)[ROWS],
                                       float (&total)[ROWS], float (&acc)[N][4]) {
  constexpr bool WIDE = ROWS == 2;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float higher = fmaxf(fmaxf(x[r][0][0], x[r][0][1]), fmaxf(x[r][1][0], x[r][1][1]));
    higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
    higher = fmaxf(fmaxf(higher, __shfl_xor_sync(~0u, higher, 2)), top[r]);
    // A maximum that is a little too low does no harm: weights may reach 2^8.
    if (__any_sync(~0u, higher > top[r] + 8)) {
      const float fade = exp2_fast(top[r] - higher);
      total[r] *= fade, top[r] = higher;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        acc[i][2 * r] *= fade, acc[i][2 * r + 1] *= fade;
        if (!WIDE) acc[i][2] *= fade, acc[i][3] *= fade;
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float w0 = exp2_fast(x[r][j][0] - top[r]), w1 = exp2_fast(x[r][j][1] - top[r]);
      const T h0 = from_float<T>(w0), h1 = from_float<T>(w1);
      if (WIDE) {
        total[r] += to_float(h0) + to_float(h1);
      } else {
        total[r] += w0 + w1;
        weights[j * 2 + 1] = pack(from_float<T>(w0 - to_float(h0)), from_float<T>(w1 - to_float(h1)));
      }
      weights[j * 2 + r] = pack(h0, h1);
    }
  }
}

}  // namespace
}  // namespace sinkattn::cuda
