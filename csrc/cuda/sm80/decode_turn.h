// Phase `turn` of decode: the new queries and key, by their angles. No torch in here.
#pragma once

#include "../turn.h"
#include "decode_block.h"

namespace sinkattn::cuda {
namespace {

// The queries as fragments: piece (step * 2 + half) * 32 + lane holds 8 dims of a row of the products. In 8 bits they are
// yet to be rounded.
template <typename B>
__device__ __forceinline__ void write_query(const B& b, float x, int angle, int member, int dim) {
  using T = typename B::T;
  uint4* fragments = b.queries + angle * B::S::QUERIES;
  if constexpr (B::EIGHT_BITS) {
    reinterpret_cast<float*>(fragments + member * B::S::QUERY_ROW)[dim] = x;
  } else {
    if (!B::WIDE) x *= b.p.query_scale;  // what is rounded is not scaled before
    T* place = reinterpret_cast<T*>(fragments + dim / 32 * 64 + member % 8 * 4 + dim % 32 / 8) + dim % 8;
    const T rounded = from_float<T>(x);
    place[member / 8 * 256] = rounded;
    if (!B::WIDE) place[256] = from_float<T>(x - to_float(rounded));
  }
}

// What is kept of a new key or value: T, or float32 where it is still to be rounded to 8 bits.
template <typename B, typename X>
__device__ typename B::New new_number(X x) {
  if constexpr (std::is_same_v<X, typename B::New>)
    return x;
  else if constexpr (B::EIGHT_BITS)
    return to_float(x);
  else
    return from_float<typename B::T>(x);
}

// A row of new numbers, float32 in shared memory, becomes what the cache holds, where it is: numbers, then their scale.
template <typename C, int DIM>
__device__ __forceinline__ void round_row(float* row, int lane) {
  constexpr int DIMS = (DIM + 31) / 32;
  float x[DIMS];
#pragma unroll
  for (int i = 0; i < DIMS; ++i) x[i] = lane + i * 32 < DIM ? row[lane + i * 32] : 0;
  const float scale = scale_of<C>(x);
  __syncwarp();  // all have read
#pragma unroll
  for (int i = 0; i < DIMS; ++i)
    if (lane + i * 32 < DIM) reinterpret_cast<uint8_t*>(row)[lane + i * 32] = rounded<C>(x[i], scale);
  if (lane == 0) row[DIM / 4] = scale;
}
// A query becomes what is multiplied, where it is: with int8 256 a + b, of four dims a and then b; with e4m3 float16, two
// dims and then what rounding left of them. Returns what the products are to be multiplied by.
template <typename C, int DIM>
__device__ __forceinline__ float round_query(float* row, int lane) {
  constexpr int DIMS = (DIM + 31) / 32;
  constexpr float LIMIT = std::is_same_v<C, int8_t> ? 127 * 256 : 1024;
  float x[DIMS];
#pragma unroll
  for (int i = 0; i < DIMS; ++i) x[i] = lane + i * 32 < DIM ? row[lane + i * 32] : 0;
  const float unit = largest_of(x) * (1 / LIMIT), inverse = unit > 1e-36f ? __fdividef(1, unit) : 0;
  __syncwarp();  // all have read
#pragma unroll
  for (int i = 0; i < DIMS; ++i) {
    const int dim = lane + i * 32;
    if (dim >= DIM) break;
    const float y = fminf(fmaxf(x[i] * inverse, -LIMIT), LIMIT);  // if one is not finite, the unit is NaN
    if constexpr (std::is_same_v<C, int8_t>) {
      const int number = int(rintf(y)), high = (number + 128) >> 8;
      int8_t* place = reinterpret_cast<int8_t*>(row) + dim / 4 * 8 + dim % 4;
      place[0] = int8_t(high), place[4] = int8_t(number - high * 256);
    } else {
      const __half rounded = from_float<__half>(y);
      __half* place = reinterpret_cast<__half*>(row) + dim / 2 * 4 + dim % 2;
      place[0] = rounded, place[2] = from_float<__half>(y - to_float(rounded));
    }
  }
  return unit;
}
// The block's queries, new keys and new values, a row a warp.
template <typename B>
__device__ __forceinline__ void round_all(const B& b) {
  using C = typename B::C;
  const int rows = 2 * (b.last_token + 1), queries = b.members * (b.has_sinks ? 2 : 1);
#pragma unroll 1
  for (int i = b.warp; i < rows + queries; i += B::WARPS) {
    if (i >= rows) {
      const int angle = i - rows >= b.members, member = i - rows - angle * b.members;
      float* row = reinterpret_cast<float*>(b.queries + angle * B::S::QUERIES + member * B::S::QUERY_ROW);
      const float unit = round_query<C, B::HEAD_DIM>(row, b.lane) * b.p.query_scale;
      if (b.lane == 0) b.units[angle * MAX_GROUP + member] = unit;
    } else if (i % 2 == 0) {
      round_row<C, B::HEAD_DIM>(b.new_keys + i / 2 * B::HEAD_DIM, b.lane);
    } else {
      round_row<C, B::V_DIM>(b.new_values + i / 2 * B::V_DIM, b.lane);
    }
  }
}

// Turns a row's one token into shared memory. What is small is asked for at once; `meanwhile`: what is asked for behind
// it. A thread takes a dim (or two) of every SPREAD-th head.
template <typename B, typename F>
__device__ __forceinline__ void turn_one(const B& b, F meanwhile) {
  using T = typename B::T;
  const Params& p = b.p;
  constexpr int THREADS = B::THREADS, HEAD_DIM = B::HEAD_DIM, MOST = B::WIDE ? 16 : 8;
  constexpr int SPREAD = THREADS >= HEAD_DIM ? THREADS / HEAD_DIM : 1, DIMS = (HEAD_DIM + THREADS - 1) / THREADS;
  constexpr int HEADS = MOST / SPREAD + (MOST % SPREAD > 0);
  const T* q = static_cast<const T*>(p.q) + b.row * p.q_row + int64_t(b.head) * p.group * p.q_head;
  const T* k = static_cast<const T*>(p.k) + b.row * p.k_row + b.head * p.k_head;
  const T* v = static_cast<const T*>(p.v) + b.row * p.v_row + b.head * p.v_head;
  const int first_head = DIMS > 1 ? 0 : threadIdx.x / HEAD_DIM, first_dim = threadIdx.x - first_head * HEAD_DIM;
  Turn turns[DIMS];
  T query[DIMS][HEADS][2], key[DIMS][2], value[DIMS];  // dims and their partners
  if (first_head < SPREAD) {
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
      const int dim = first_dim + i * THREADS;
      if (HEAD_DIM % THREADS && dim >= HEAD_DIM) break;
      turns[i] = Turn(p, b.row, dim);
      key[i][0] = k[dim], key[i][1] = k[turns[i].other];
      if (dim < B::V_DIM) value[i] = v[dim];
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const T* x = q + (first_head + h * SPREAD) * p.q_head;
        if (first_head + h * SPREAD < p.group) query[i][h][0] = x[dim], query[i][h][1] = x[turns[i].other];
      }
    }
  }
  meanwhile();
  if (first_head < SPREAD) {
#pragma unroll
    for (int i = 0; i < DIMS; ++i) {
      const int dim = first_dim + i * THREADS;
      if (HEAD_DIM % THREADS && dim >= HEAD_DIM) break;
      if (first_head == 0) {
        b.new_keys[dim] = new_number<B>(turns[i](key[i], 0));
        if (dim < B::V_DIM) b.new_values[dim] = new_number<B>(value[i]);
      }
#pragma unroll
      for (int h = 0; h < HEADS; ++h) {
        const int member = first_head + h * SPREAD;
        if (member >= p.group) continue;
        write_query(b, turns[i](query[i][h], 0), 0, member, dim);
        if (b.has_sinks) write_query(b, turns[i](query[i][h], 1), 1, member, dim);
      }
    }
  }
}

// The same of a row's few tokens: queries of the block's own, keys and values of those before them as well.
template <typename B, typename F>
__device__ __forceinline__ void turn_few(const B& b, F meanwhile) {
  using T = typename B::T;
  const Params& p = b.p;
  constexpr int THREADS = B::THREADS, HEAD_DIM = B::HEAD_DIM, V_DIM = B::V_DIM;
  const T* q = static_cast<const T*>(p.q) + b.row * p.q_row + int64_t(b.head) * p.group * p.q_head;
  const T* k = static_cast<const T*>(p.k) + b.row * p.k_row + b.head * p.k_head;
  const T* v = static_cast<const T*>(p.v) + b.row * p.v_row + b.head * p.v_head;
#pragma unroll 4
  for (int i = threadIdx.x; i < b.members * HEAD_DIM; i += THREADS) {
    const int member = i / HEAD_DIM, dim = i % HEAD_DIM, token = b.first_token + member / p.group;
    const Turn turn(p, int64_t(b.row) * b.tokens + token, dim);
    const T* x = q + token * p.q_token + member % p.group * p.q_head;
    const T both[2] = {x[dim], x[turn.other]};
    write_query(b, turn(both, 0), 0, member, dim);
    if (b.has_sinks) write_query(b, turn(both, 1), 1, member, dim);
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < (b.last_token + 1) * HEAD_DIM; i += THREADS) {
    const int token = i / HEAD_DIM, dim = i % HEAD_DIM;
    const Turn turn(p, int64_t(b.row) * b.tokens + token, dim);
    const T* x = k + token * p.k_token;
    const T both[2] = {x[dim], x[turn.other]};
    b.new_keys[i] = new_number<B>(turn(both, 0));
    if (dim < V_DIM) b.new_values[token * V_DIM + dim] = new_number<B>(v[token * p.v_token + dim]);
  }
  meanwhile();
}

}  // namespace
}  // namespace sinkattn::cuda
