// Products of stack.cu: x into shared memory, normalised, and the block's share of its product with a weight. No torch in
// here.
#pragma once

#include "../activate.h"
#include "stack_weights.h"

namespace sinkattn::cuda {
namespace {

// How far rows of x lie apart in shared memory, in pieces of 16 bytes: lanes that have two rows meet different banks.
__host__ __device__ inline int apart_of(int pieces) { return pieces + (12 - pieces % 8) % 8; }

// x, (rows, columns), normalised if there is a norm, into shared memory. squares: (MAX_STACK_ROWS, WARPS). handed: from
// other blocks; null for x of the call. meanwhile: what a warp does until it is there.
template <typename T, int MOST, typename F>
__device__ __forceinline__ void gather(const Stack& p, const Handed* handed, uint32_t epoch, int pieces,
                                       const void* norm_weight, uint4* x, float* squares, F meanwhile) {
  const int rows = MOST == 1 ? 1 : p.call.batch, quads = pieces * 2, apart = apart_of(pieces) * 2;  // quads: of 4 numbers
  uint2* to = reinterpret_cast<uint2*>(x);
  const uint2* norm = static_cast<const uint2*>(norm_weight);
  uint2 by = make_uint2(0, 0);  // asked for before x is there
  if (norm && threadIdx.x < quads) by = __ldg(norm + threadIdx.x);
  float total[MOST] = {};
  constexpr int TOGETHER = 4;  // looked at at a time: quads of one row, or rows
  constexpr bool ONE = MOST == 1;
  uint4 two[TOGETHER];
  auto is_there = [&](int i, int first, int n) { return ONE ? i + n * THREADS < quads : i < quads && first + n < rows; };
  auto ask = [&](int i, int first, int n) {
    const int at = ONE ? i + n * THREADS : (first + n) * quads + i;
    if (handed) {
      two[n] = read_pairs(handed + at * 2);
    } else {
      const uint2 quad = static_cast<const uint2*>(p.x)[at];
      two[n] = make_uint4(quad.x, epoch, quad.y, epoch);
    }
  };
#pragma unroll
  for (int n = 0; n < TOGETHER; ++n)
    if (is_there(threadIdx.x, 0, n)) ask(threadIdx.x, 0, n);
  meanwhile();
#pragma unroll 1
  for (int i = threadIdx.x; i < quads; i += ONE ? TOGETHER * THREADS : THREADS) {
#pragma unroll
    for (int first = 0; first < MOST; first += TOGETHER) {
      if (first >= rows) break;
      if (i > threadIdx.x || first > 0) {
#pragma unroll
        for (int n = 0; n < TOGETHER; ++n)
          if (is_there(i, first, n)) ask(i, first, n);
      }
#pragma unroll
      for (int n = 0; n < TOGETHER; ++n) {
        if (!is_there(i, first, n)) break;
        while (two[n].y != epoch || two[n].w != epoch) ask(i, first, n);
        to[ONE ? i + n * THREADS : (first + n) * apart + i] = make_uint2(two[n].x, two[n].z);
        const float2 a = unpack<T>(two[n].x), b = unpack<T>(two[n].z);
        total[ONE ? 0 : first + n] += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
      }
    }
  }
  if (norm) {
#pragma unroll
    for (int row = 0; row < MOST; ++row) {
      if (row >= rows) break;
#pragma unroll
      for (int apart = 16; apart > 0; apart /= 2) total[row] += __shfl_xor_sync(~0u, total[row], apart);
      if (threadIdx.x % 32 == 0) squares[row * WARPS + threadIdx.x / 32] = total[row];
    }
    __syncthreads();
#pragma unroll
    for (int row = 0; row < MOST; ++row) {
      if (row >= rows) break;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += squares[row * WARPS + w];
      total[row] = rsqrtf(sum / (pieces * 8) + p.norm_eps);
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < quads; i += THREADS) {
      if (i >= THREADS) by = __ldg(norm + i);
#pragma unroll
      for (int row = 0; row < MOST; ++row) {
        if (row >= rows) break;
        uint2 quad = to[row * apart + i];
        normalise<T>(quad.x, by.x, total[row], p.norm_shift), normalise<T>(quad.y, by.y, total[row], p.norm_shift);
        to[row * apart + i] = quad;
      }
    }
  }
  __syncthreads();
}

// What products leave: where it goes, and what is added.
struct Result {
  const void* bias;
  void* own;  // (rows, the block's share) of what goes from layer to layer, in shared memory; null if nothing is added
  Handed* to;
  void* out;  // of the last layer
};

// The block's share of one product of x in shared memory. sums: twice (WARPS, rows, SUMS).
template <typename T, int MOST>
__device__ __forceinline__ void multiply_share(const Stack& p, const Share& share, Weights& weights, const uint4* x,
                                               uint32_t epoch, const Result& result, float* sums) {
  const int rows = MOST == 1 ? 1 : p.call.batch, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, c = lane % 4, most = share.gated ? ROWS / 2 : ROWS, end = share.end, size = share.size;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  float* next_sums = sums + WARPS * rows * SUMS;
  const int used = min(WARPS, share.chunks);
  int writer = threadIdx.x;  // warps take turns at what is done once for all
  const int here = place(g, c), there = here ^ 4;  // pieces c and 4 + c of row g of a chunk
  const uint4* mine = x + g * apart_of(share.pieces) + c;
  const T* bias = static_cast<const T*>(result.bias);
#pragma unroll 1
  for (int first = share.begin; first < end; first += size) {
    const int row = writer / most, output = writer % most;
    const bool writes = row < rows && output < min(size, end - first);
    T biases[2];  // asked for before they are needed
    if (writes && bias) {
      biases[0] = bias[first + output];
      if (share.gated) biases[1] = bias[share.count + first + output];
    }
    float products[2][4] = {};  // of pieces c, of pieces 4 + c
#pragma unroll 1
    for (int chunk = warp; chunk < share.chunks; chunk += WARPS) {
      uint4 y = zero, z = zero;  // row g of x
      if (g < rows) y = mine[chunk * PIECES], z = mine[chunk * PIECES + 4];
      const uint4* of_weight = weights.take();
      const uint4 a = of_weight[here], b = of_weight[here + 8 * PIECES];  // rows g and g + 8 of the weight
      const uint4 d = of_weight[there], e = of_weight[there + 8 * PIECES];
      multiply<T>(products[0], a.x, b.x, a.y, b.y, y.x, y.y);
      multiply<T>(products[1], d.x, e.x, d.y, e.y, z.x, z.y);
      multiply<T>(products[0], a.z, b.z, a.w, b.w, y.z, y.w);
      multiply<T>(products[1], d.z, e.z, d.w, e.w, z.z, z.w);
      weights.settle(weights.stages / 2);
    }
    // Warps meet. A lane has rows g and g + 8 of the weight, columns 2 c and 2 c + 1.
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (c * 2 + i % 2 < rows)
        sums[(warp * rows + c * 2 + i % 2) * SUMS + g + i / 2 * 8] = products[0][i] + products[1][i];
    __syncthreads();
    if (writer / 32 * 32 < rows * most) {
      float y[1] = {0};
      if (writes) {
        auto sum = [&](int number) {
          float total = 0;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) total += w < used ? sums[(w * rows + row) * SUMS + number] : 0;
          return total;
        };
        y[0] = sum(output) + (bias ? to_float(biases[0]) : 0);
        if (share.gated) {
          activate(y, p.activation);
          y[0] *= sum(most + output) + (bias ? to_float(biases[1]) : 0);
        }
        if (result.own) {
          T& own = static_cast<T*>(result.own)[row * (end - share.begin) + first - share.begin + output];
          own = from_float<T>(y[0] + to_float(own)), y[0] = to_float(own);
        }
      }
      const float other = __shfl_xor_sync(~0u, y[0], 1);
      if (writes && output % 2 == 0) {
        const uint32_t both = pack<T>(y[0], other);
        const int64_t at = (int64_t(row) * share.count + first + output) / 2;
        write_pair(result.to + at, both, epoch);
        if (result.out) static_cast<uint32_t*>(result.out)[at] = both;
      }
    }
    // The next sums go beside these: whoever writes over these has met all warps after they were read.
    writer = (writer + 32) % THREADS;
    float* const read_last = sums;
    sums = next_sums, next_sums = read_last;
  }
}

}  // namespace
}  // namespace sinkattn::cuda
