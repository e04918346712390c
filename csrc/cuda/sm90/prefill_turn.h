// Phase `turn` of prefill for queries, which go to shared memory. No torch in here.
#pragma once

#include "prefill_tile.h"
#include "turn.h"

namespace sinkattn::cuda {
namespace {

__device__ bool differ(const float4& x, const float4& y) {
  return x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w;
}

// Queries of a tile, tokens `low` to `high` of all its heads, turned by both angles: the share of one of so many
// threads. Dims that the head does not have become zero. AT_ONCE: jobs whose loads are in flight, of up to HEADS heads.
// Returns whether any angle of sinks is another than that of text.
template <typename T, int DIM, int AT_ONCE, int HEADS>
__device__ bool turn_queries(const Prefill& p, const Tile<Shape<DIM>::KEYS>& tile, int low, int high, int thread,
                             int threads, char* to, char* sink_queries) {
  constexpr int JOBS = DIM / 8;
  const int start = tile.padding + tile.first, heads = heads_of_tile(p);
  const T* q = static_cast<const T*>(p.q) + tile.row * p.q_row + tile.head * p.q_head + start * p.q_token;
  const float* angles = p.rotation + (int64_t(tile.row) * p.tokens + start) * 4 * p.rotary_half;
  bool differs = false;
#pragma unroll 1
  for (int begin = low * JOBS + thread; begin < high * JOBS; begin += threads * AT_ONCE) {
    uint2 first[AT_ONCE][HEADS], second[AT_ONCE][HEADS];
    float4 cos[AT_ONCE][2], sin[AT_ONCE][2];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int token = (begin + i * threads) / JOBS, job = (begin + i * threads) % JOBS;
      const Fours fours = fours_of(p, job);
      const bool inside = token < high && start + token < p.tokens && job < p.head_dim / 8;
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const uint2* x = reinterpret_cast<const uint2*>(q + token * p.q_token + h * p.q_head);
        first[i][h] = inside && h < heads ? __ldg(x + fours.first) : make_uint2(0, 0);
        second[i][h] = inside && h < heads ? __ldg(x + fours.second) : make_uint2(0, 0);
      }
      const bool turns = inside && p.rotation && fours.angle >= 0;
      const float* angle = angles + token * 4 * p.rotary_half + fours.angle;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const float4* from = reinterpret_cast<const float4*>(angle + which * 2 * p.rotary_half);
        cos[i][which] = turns ? __ldg(from) : make_float4(1, 1, 1, 1);
        sin[i][which] = turns ? __ldg(from + p.rotary_half / 4) : make_float4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      differs = differs || differ(cos[i][0], cos[i][1]) || differ(sin[i][0], sin[i][1]);
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int token = (begin + i * threads) / JOBS;
      const Fours fours = fours_of(p, (begin + i * threads) % JOBS);
      if (token >= high) break;
      const int row = token / 16 * heads * 16 + token % 16;  // of the first head
      auto place = [&](int four) {
        return four / 16 * Shape<DIM>::QUERY_COLUMN + row * 128 + (four / 2 % 8 ^ row % 8) * 16 + four % 2 * 8;
      };
      const int first_place = place(fours.first), second_place = place(fours.second);
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        if (h >= heads) break;
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          uint2 x = first[i][h], y = second[i][h];
          turn<T>(x, y, cos[i][which], sin[i][which], p.interleaved);
          char* there = (which == 0 ? to : sink_queries) + h * 16 * 128;
          *reinterpret_cast<uint2*>(there + first_place) = x;
          *reinterpret_cast<uint2*>(there + second_place) = y;
        }
      }
    }
  }
  return differs;
}

}  // namespace
}  // namespace sinkattn::cuda
