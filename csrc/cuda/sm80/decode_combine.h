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

// The end of a block: its warps meet, then the blocks that share the key head, and somebody writes the output. Columns,
// (group, V_DIM), are taken four at a time. nth: of the new tokens, the last one of the block.
template <typename B>
struct Ending {
  using T = typename B::T;
  static constexpr int V_DIM = B::V_DIM, STEP = B::THREADS * 4;
  const B& b;
  const float* softmax;  // (warps, MAX_GROUP, maximum and sum)
  const int nth, columns;

  __device__ __forceinline__ Ending(const B& b, const float* softmax, int nth)
      : b(b), softmax(softmax), nth(nth), columns(b.group * V_DIM) {}

  __device__ __forceinline__ Combined of_block(int i) const {
    return combine<B::WARPS>(B::WARPS, reinterpret_cast<float*>(b.shared) + i, B::S::WARP * 4, softmax + i / V_DIM * 2,
                             MAX_GROUP * 2);
  }
  __device__ __forceinline__ void finish_at(int i, const Combined& x) const {
    const Params& p = b.p;
    const int member = i / V_DIM, dim = i % V_DIM;
    if (!B::FEW) return finish<T, V_DIM>(p, b.query_of(member), b.head * p.group + member, dim, x);
    const int behind = b.own - 1 - member / p.group;  // its token lies before the last one
    if (member >= b.members) return;
    if (behind <= nth) return finish<T, V_DIM>(p, b.query_of(member), b.head * p.group + member % p.group, dim, x);
    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + b.query_of(member) * V_DIM + dim) = make_uint2(0, 0);  // padding
  }

  __device__ __forceinline__ void alone() const {
    for (int i = threadIdx.x * 4; i < columns; i += STEP) finish_at(i, of_block(i));
  }
  // The blocks of a cluster hand over to the first, whose barrier counts the bytes.
  __device__ __forceinline__ void in_cluster(uint64_t* arrived) const {
    float* handed_softmax = b.handed + b.splits * columns;
    const unsigned there = in_first_block(b.handed + b.rank * columns);
    const unsigned there_softmax = in_first_block(handed_softmax + b.rank * b.group * 2);
    const unsigned barrier = in_first_block(arrived);
    cluster_wait();  // the first block of the cluster has started
    for (int i = threadIdx.x * 4; i < columns; i += STEP) {
      const Combined x = of_block(i);
      hand_over(there + i * 4, x.sum, barrier);
      if (i % V_DIM == 0) hand_over(there_softmax + i / V_DIM * 8, make_float2(x.top, x.total), barrier);
    }
    if (b.rank > 0) return;
    wait_for_bytes(arrived);
    for (int i = threadIdx.x * 4; i < columns; i += STEP)
      finish_at(i, combine<MAX_CLUSTER>(b.splits, b.handed + i, columns, handed_softmax + i / V_DIM * 2, b.group * 2));
  }
  // Blocks without a cluster meet in memory; the last to arrive combines. is_last: in shared memory.
  __device__ __forceinline__ void in_memory(bool* is_last) const {
    const Params& p = b.p;
    const int64_t pairs = int64_t(gridDim.z) * p.num_kv_heads;
    float* found_values = p.partials + b.pair * b.splits * columns;
    float* found_softmax = p.partials + pairs * b.splits * columns + b.pair * b.splits * b.group * 2;
    for (int i = threadIdx.x * 4; i < columns; i += STEP) {
      const Combined x = of_block(i);
      *reinterpret_cast<float4*>(found_values + b.rank * columns + i) = x.sum;
      if (i % V_DIM == 0)
        *reinterpret_cast<float2*>(found_softmax + (b.rank * b.group + i / V_DIM) * 2) = make_float2(x.top, x.total);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      *is_last = count_in(p.arrivals + b.pair) == b.splits - 1;
      if (*is_last) p.arrivals[b.pair] = 0;  // for the next launch
    }
    __syncthreads();
    if (!*is_last) return;
    for (int i = threadIdx.x * 4; i < columns; i += STEP)
      finish_at(i, combine<8>(b.splits, found_values + i, columns, found_softmax + i / V_DIM * 2, b.group * 2));
  }
};

}  // namespace
}  // namespace sinkattn::cuda
