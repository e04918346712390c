// Phase `combine` of decode: what warps, blocks and clusters found becomes the output. No torch in here.
#pragma once

#include "decode_attend.h"

namespace sinkattn::cuda {
namespace {

// Sums of weighted values, with the maximum and sum of the softmax they belong to.
struct Combined {
  float4 sum;
  float top, total;
};

// The same of `count` parts whose values and softmax lie so far apart, MOST at a time, in their order: the same bits
// every time.
template <int MOST>
__device__ Combined combine(int count, const float* values, int apart, const float* softmax, int softmax_apart) {
  Combined x = {make_float4(0, 0, 0, 0), LOWEST, 0};
  for (int first = 0; first < count; first += MOST, values += MOST * apart, softmax += MOST * softmax_apart) {
    float2 part[MOST];
    float4 value[MOST];
#pragma unroll
    for (int n = 0; n < MOST; ++n) {
      const bool there = first + n < count;
      part[n] = there ? *reinterpret_cast<const float2*>(softmax + n * softmax_apart) : make_float2(LOWEST, 0);
      value[n] = there ? *reinterpret_cast<const float4*>(values + n * apart) : make_float4(0, 0, 0, 0);
    }
    float top = x.top;
#pragma unroll
    for (int n = 0; n < MOST; ++n) top = fmaxf(top, part[n].x);
    const float fade = exp2_fast(x.top - top);
    x.top = top, x.total *= fade, x.sum.x *= fade, x.sum.y *= fade, x.sum.z *= fade, x.sum.w *= fade;
#pragma unroll
    for (int n = 0; n < MOST; ++n) {
      const float weight = exp2_fast(part[n].x - top);
      x.total += weight * part[n].y;
      x.sum.x += weight * value[n].x, x.sum.y += weight * value[n].y;
      x.sum.z += weight * value[n].z, x.sum.w += weight * value[n].w;
    }
  }
  return x;
}

// What a warp found, (group, V_DIM), and its softmax, (MAX_GROUP, maximum and sum), to shared memory.
template <int V_DIM, int ROWS, int N>
__device__ __forceinline__ void store_found(const float (&acc)[N][4], const float (&top)[ROWS], float (&total)[ROWS],
                                            int group, int g, int c, float* found, float (*softmax)[2]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    total[r] += __shfl_xor_sync(~0u, total[r], 1);
    total[r] += __shfl_xor_sync(~0u, total[r], 2);
    const int member = g + 8 * r;
    if (member >= group) continue;
    if (c == 0) softmax[member][0] = top[r], softmax[member][1] = total[r];
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int dim = j * 64 + c * 16 + e * 8;
        if (V_DIM % 64 && dim >= V_DIM) continue;
        float a[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float* both = acc[j * 8 + i];
          a[i] = ROWS == 2 ? both[2 * r + e] : both[e] + both[2 + e];
        }
        float4* place = reinterpret_cast<float4*>(found + member * V_DIM + dim);
        place[0] = make_float4(a[0], a[1], a[2], a[3]), place[1] = make_float4(a[4], a[5], a[6], a[7]);
      }
    }
  }
}

// Four outputs of a query, number (row * tokens + token) * num_heads + head of all, from a dim on. What was found
// elsewhere and a learned logit join the softmax here.
template <typename T, int V_DIM>
__device__ __forceinline__ void finish(const Params& p, int64_t query, int head, int dim, Combined x) {
  for (int part = 0; part < p.joined_parts; ++part) {
    const int64_t found = int64_t(part) * p.batch * p.num_kv_heads * p.group + query;
    const float logit = p.joined_logits[found] * LOG2E;
    const float4 value = *reinterpret_cast<const float4*>(p.joined_values + found * V_DIM + dim);
    const float top = fmaxf(x.top, logit), fade = exp2_fast(x.top - top), weight = exp2_fast(logit - top);
    x.top = top, x.total = x.total * fade + weight;
    x.sum.x = x.sum.x * fade + weight * value.x, x.sum.y = x.sum.y * fade + weight * value.y;
    x.sum.z = x.sum.z * fade + weight * value.z, x.sum.w = x.sum.w * fade + weight * value.w;
  }
  float total = x.total, fade = 1;
  if (p.learned_logits) {
    const float logit = p.learned_logits[head] * LOG2E, top = fmaxf(x.top, logit);
    fade = exp2_fast(x.top - top), total = total * fade + exp2_fast(logit - top);
  }
  fade = __fdividef(fade, total);
  const T rounded[4] = {from_float<T>(x.sum.x * fade), from_float<T>(x.sum.y * fade), from_float<T>(x.sum.z * fade),
                        from_float<T>(x.sum.w * fade)};
  *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + query * V_DIM + dim) =
      make_uint2(pack(rounded[0], rounded[1]), pack(rounded[2], rounded[3]));
}

}  // namespace
}  // namespace sinkattn::cuda
