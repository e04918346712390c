// Phase `turn` of decode: the new queries and key, by their angles. No torch in here.
#pragma once

#include "../turn.h"
#include "decode_block.h"

namespace sinkattn::cuda {
namespace {

// The queries as fragments: piece (step * 2 + half) * 32 + lane holds 8 dims of a row of the products.
template <bool WIDE, typename T>
__device__ __forceinline__ void write_query(float x, int member, int dim, T* fragments) {
  T* place = fragments + (dim / 32 * 64 + member % 8 * 4 + dim % 32 / 8) * 8 + dim % 8;
  const T rounded = from_float<T>(x);
  place[member / 8 * 256] = rounded;
  if (!WIDE) place[256] = from_float<T>(x - to_float(rounded));
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
  const float scale = scale_of<C>(x);  // all have read
#pragma unroll
  for (int i = 0; i < DIMS; ++i)
    if (lane + i * 32 < DIM) reinterpret_cast<uint8_t*>(row)[lane + i * 32] = rounded<C>(x[i], scale);
  if (lane == 0) row[DIM / 4] = scale;
}
// The block's new keys and values, a row a warp.
template <typename B>
__device__ __forceinline__ void round_new(const B& b) {
#pragma unroll 1
  for (int i = b.warp; i < 2 * (b.last_token + 1); i += B::WARPS) {
    if (i % 2 == 0)
      round_row<typename B::C, B::HEAD_DIM>(b.new_keys + i / 2 * B::HEAD_DIM, b.lane);
    else
      round_row<typename B::C, B::V_DIM>(b.new_values + i / 2 * B::V_DIM, b.lane);
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
        const float scale = B::WIDE ? 1 : p.query_scale;  // what is rounded is not scaled before
        write_query<B::WIDE>(turns[i](query[i][h], 0) * scale, member, dim, b.queries);
        if (b.has_sinks)
          write_query<B::WIDE>(turns[i](query[i][h], 1) * scale, member, dim, b.queries + B::S::QUERIES * 8);
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
    write_query<B::WIDE>(turn(both, 0), member, dim, b.queries);
    if (b.has_sinks) write_query<B::WIDE>(turn(both, 1), member, dim, b.queries + B::S::QUERIES * 8);
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
