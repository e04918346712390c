// What linear_wide.cu is made of: copies, also within a cluster, the norm's weight on x, the end of an output. No torch
// in here.
#pragma once

#include "../activate.h"
#include "hopper.h"

namespace sinkattn::cuda {
namespace {

constexpr int KC = 64;  // a line of 128 bytes
constexpr int X_ROWS = MAX_LINEAR_ROWS, NORM_BYTES = KC * 2;
constexpr int GROUPS = 2, CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128;
constexpr int MAX_SPLIT = 4, MIN_STAGES = 4, MAX_STAGES = 12;

struct Maps {
  CUtensorMap x, weight, norm;
};
// Rows of the weight at a time, blocks of a cluster, stages of the ring, shared memory in bytes.
struct Plan {
  int tile, split, stages, bytes;
};
// in: of even and of odd rounds. With an odd number of stages a group sees every other round of a stage, and the parity of
// one barrier would not tell a round that has not come from the one before the last, which it has seen. Here the round
// before it on the same barrier has been multiplied, or nobody could have asked for what lies between.
struct Barriers {
  uint64_t in[2][MAX_STAGES], out[MAX_STAGES], found;
};

// Rows of x that are copied: what is not there gives sums that nobody stores.
__host__ __device__ int x_rows_of(const Linear& p) { return (p.rows + 7) / 8 * 8; }
// How far rows of sums lie apart, in numbers, so that lanes meet different banks.
__host__ __device__ constexpr int apart(int columns) { return (columns + 15) / 16 * 16 + 8; }

__device__ void copy_in(unsigned shared, const CUtensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}
__device__ void copy_in_once(unsigned shared, const CUtensorMap& map, int column, int row, uint64_t* barrier,
                             uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, "
      "%3}], [%4], %5;" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}
// Where a block of the cluster has what is at this address here.
__device__ unsigned of_block(unsigned address, int rank) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
// Into the memory of a block of the cluster, which counts the bytes at a barrier.
__device__ void put(unsigned place, float x, unsigned barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(place),
               "r"(__float_as_uint(x)), "r"(barrier)
               : "memory");
}
__device__ void put(unsigned place, unsigned from, int bytes, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(place),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// x of 64 columns, 16 rows a warp, to registers: for every 16 columns rows g and g + 8, 8 columns on again.
__device__ void load(uint32_t (&a)[16], unsigned rows) {
  const int lane = threadIdx.x % 32, row = lane % 16, half = lane / 16;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[4 * k]), "=r"(a[4 * k + 1]), "=r"(a[4 * k + 2]), "=r"(a[4 * k + 3])
                 : "r"(rows + row * 128 + ((2 * k + half) ^ row % 8) * 16)
                 : "memory");
}

// Two numbers of x, made smaller or larger by a power of two, times shift + w.
template <typename T>
__device__ uint32_t weighed(uint32_t x, float size, uint32_t w, float shift) {
  using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  if (shift != 0) {
    const float2 n = unpack<T>(x), v = unpack<T>(w);
    return pack<T>((shift + v.x) * (n.x * size), (shift + v.y) * (n.y * size));
  }
  Two y = reinterpret_cast<const Two&>(x);
  if constexpr (std::is_same_v<T, __half>) y = __hmul2(y, __float2half2_rn(size));
  y = __hmul2(y, reinterpret_cast<const Two&>(w));
  return reinterpret_cast<const uint32_t&>(y);
}

// Where somebody is in the ring, and how often round it.
struct Place {
  int stage, round;
  __device__ void advance(int by, int stages) {  // by at most all of it
    stage += by;
    if (stage >= stages) stage -= stages, ++round;
  }
  __device__ uint64_t* came(Barriers& at) const { return &at.in[round & 1][stage]; }
  __device__ void wait_in(Barriers& at) const { wait(came(at), round >> 1 & 1); }
};

// Sums of this block's outputs, (..., X_ROWS, between): of its own columns, of those of the others in its cluster, and
// what scales them. With gates, what they let through lies `to_rest` further on.
struct Sums {
  const float* first;
  int between, to_rest;
};
struct Found {
  Sums own, of_others;
  int others;
  float scale;
};

__device__ void add_to(float (&y)[1], const float* x) { y[0] += x[0]; }
__device__ void add_to(float (&y)[8], const float* x) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(x + i);
    y[i] += four.x, y[i + 1] += four.y, y[i + 2] += four.z, y[i + 3] += four.w;
  }
}

// N outputs side by side, from number `output` of `count` in a row on; `at` is their place in a row of sums.
template <typename T, int N>
__device__ void finish(const Linear& p, const Found& found, int count, int row, int output, int at) {
  const bool gated = found.own.to_rest != 0;
  using Piece = std::conditional_t<N == 8, uint4, T>;
  union Numbers {
    Piece piece;
    T number[N];
    __device__ Numbers() {}
  };
  const int64_t place = int64_t(row) * count + output;
  Numbers residual, bias, bias_of_rest, result;
  if (p.residual) residual.piece = *reinterpret_cast<const Piece*>(static_cast<const T*>(p.residual) + place);
  if (p.bias) {
    const T* from = static_cast<const T*>(p.bias) + output;
    bias.piece = *reinterpret_cast<const Piece*>(from);
    if (gated) bias_of_rest.piece = *reinterpret_cast<const Piece*>(from + count);
  }
  float y[N] = {}, rest[N] = {};
  auto add = [&](const Sums& sums, int part) {
    const float* from = sums.first + (part * X_ROWS + row) * sums.between + at;
    add_to(y, from);
    if (gated) add_to(rest, from + sums.to_rest);
  };
  add(found.own, 0);
  for (int other = 0; other < found.others; ++other) add(found.of_others, other);
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = y[i] * found.scale + (p.bias ? to_float(bias.number[i]) : 0);
  if (gated) {
    activate(y, p.activation);
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] *= rest[i] * found.scale + (p.bias ? to_float(bias_of_rest.number[i]) : 0);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) result.number[i] = from_float<T>(p.residual ? y[i] + to_float(residual.number[i]) : y[i]);
  *reinterpret_cast<Piece*>(static_cast<T*>(p.out) + place) = result.piece;
}

}  // namespace
}  // namespace sinkattn::cuda
