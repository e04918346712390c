// The kernel of decode: `fetch`, `turn`, `append`, `attend`, `combine`. No torch in here.
#pragma once

#include "../launch.h"
#include "decode_combine.h"
#include "decode_turn.h"

namespace sinkattn::cuda {
namespace {

// FEW: of several tokens a row. A block takes `width` of them, whose query heads are rows of the same products (WIDE).
template <typename T, int HEAD_DIM, int V_DIM, bool WIDE, bool LARGE, bool FEW>
__global__ void __launch_bounds__(Shape<HEAD_DIM, V_DIM, LARGE>::THREADS)
    decode_kernel(const __grid_constant__ Params p, int share, int width) {  // share: tiles of a block at least
  static_assert(WIDE || !FEW);
  using S = Shape<HEAD_DIM, V_DIM, LARGE>;
  constexpr int WARPS = S::WARPS, THREADS = S::THREADS;
  constexpr int ROWS = WIDE ? 2 : 1;                // softmax rows per lane: members g and g + 8
  extern __shared__ __align__(128) uint4 shared[];  // a row of a tile's column is a line; across two, copies are slow
  __shared__ __align__(8) float softmax[WARPS][MAX_GROUP][2];  // maximum and sum
  __shared__ uint64_t arrived;
  __shared__ bool is_last;
  let_next_launch();
  const int rank = blockIdx.x, splits = gridDim.x, head = blockIdx.y;
  const int group = FEW ? width * p.group : p.group;  // queries of the block: its members
  const bool clustered = LARGE && splits > 1;
  if (clustered) {
    if (rank == 0 && threadIdx.x == 0) expect_bytes(&arrived, splits * group * (V_DIM + 2) * 4);
    cluster_arrive();
  }
  const int tokens = FEW ? p.tokens : 1, blocks = FEW ? (tokens + width - 1) / width : 1, number = blockIdx.z;
  const int row = FEW ? number / blocks : number, first_token = FEW ? number % blocks * width : 0;
  const int own = FEW ? min(width, tokens - first_token) : 1, last_token = first_token + own - 1;  // tokens of the block
  const int members = own * p.group;  // that are there
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int slots = p.sink_size + p.ring_size, tiles = (slots + KEYS - 1) / KEYS;
  const int larger = tiles - share * splits;  // the last blocks take one more: the first ones have the sinks
  const int begin = rank * share + max(rank - (splits - larger), 0);
  const bool has_sinks = begin * KEYS < p.sink_size;
  int end = begin + share + (rank >= splits - larger);

  uint4* staged = shared + warp * S::WARP;
  T* queries = reinterpret_cast<T*>(shared + S::BLOCK);  // text, then sink
  T* new_keys = queries + 2 * S::QUERIES * 8;        // (tokens, HEAD_DIM)
  T* new_values = new_keys + tokens * HEAD_DIM;      // (tokens, V_DIM)
  float* handed = reinterpret_cast<float*>(new_values + tokens * V_DIM);  // (splits, group, V_DIM), (splits, group, 2)

  // Fetch: tiles, whatever the length of the row is.
  T* keys = static_cast<T*>(p.k_cache) + int64_t(row) * p.k_cache_row + head * p.k_cache_head;
  T* values = static_cast<T*>(p.v_cache) + int64_t(row) * p.v_cache_row + head * p.v_cache_head;
  auto fetch = [&](int tile, int stage) {
    if (tile < end) {
      uint4 *key_rows = staged + stage * S::TILE, *value_rows = key_rows + Rows<HEAD_DIM>::SIZE;
      copy_rows<HEAD_DIM>(keys, p.k_cache_slot, tile * KEYS, slots, lane, key_rows);
      copy_rows<V_DIM>(values, p.v_cache_slot, tile * KEYS, slots, lane, value_rows);
    }
    end_of_copies();
  };
  const int early = p.overlap ? (S::STAGES > 1 ? S::STAGES - 1 : 1) : 0;  // what is small shall not wait for all
#pragma unroll 1
  for (int stage = 0; stage < early; ++stage) fetch(begin + warp + stage * WARPS, stage);
  wait_for_launch();
  const int64_t pair = int64_t(number) * p.num_kv_heads + head;
  if (!LARGE && splits > 1 && threadIdx.x == 0)  // into the L2, long before it is needed
    prefetch(p.arrivals + pair);

  // Turn. What is small is asked for at once, and ahead of tiles, as it would wait behind them: the row's state, its
  // angles, query, new key and value.
  const int64_t length = p.lengths[row], count = p.counts ? p.counts[row] : tokens;  // used later: nothing shall wait
  const T* q = static_cast<const T*>(p.q) + row * p.q_row + int64_t(head) * p.group * p.q_head;
  const T* k = static_cast<const T*>(p.k) + row * p.k_row + head * p.k_head;
  const T* v = static_cast<const T*>(p.v) + row * p.v_row + head * p.v_head;
  // The queries as fragments: piece (step * 32 + lane) * 2 + half holds 8 dims of a row of the products.
  auto write = [&](float x, int member, int dim, T* fragments) {
    T* place = fragments + (dim / 32 * 32 + member % 8 * 4 + dim % 32 / 8) * 16 + dim % 8;
    const T rounded = from_float<T>(x);
    place[member / 8 * 8] = rounded;
    if (!WIDE) place[8] = from_float<T>(x - to_float(rounded));
  };
  if constexpr (FEW) {
#pragma unroll 4
    for (int i = threadIdx.x; i < members * HEAD_DIM; i += THREADS) {
      const int member = i / HEAD_DIM, dim = i % HEAD_DIM, token = first_token + member / p.group;
      const Turn turn(p, int64_t(row) * tokens + token, dim);
      const T* x = q + token * p.q_token + member % p.group * p.q_head;
      const T both[2] = {x[dim], x[turn.other]};
      write(turn(both, 0), member, dim, queries);
      if (has_sinks) write(turn(both, 1), member, dim, queries + S::QUERIES * 8);
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < (last_token + 1) * HEAD_DIM; i += THREADS) {  // and of the tokens before
      const int token = i / HEAD_DIM, dim = i % HEAD_DIM;
      const Turn turn(p, int64_t(row) * tokens + token, dim);
      const T* x = k + token * p.k_token;
      const T both[2] = {x[dim], x[turn.other]};
      new_keys[i] = from_float<T>(turn(both, 0));
      if (dim < V_DIM) new_values[token * V_DIM + dim] = v[token * p.v_token + dim];
    }
#pragma unroll 1
    for (int stage = early; stage < S::STAGES; ++stage) fetch(begin + warp + stage * WARPS, stage);
  } else {
    // A thread takes a dim (or two) of every SPREAD-th head.
    constexpr int SPREAD = THREADS >= HEAD_DIM ? THREADS / HEAD_DIM : 1, DIMS = (HEAD_DIM + THREADS - 1) / THREADS;
    constexpr int HEADS = (WIDE ? 16 : 8) / SPREAD + ((WIDE ? 16 : 8) % SPREAD > 0);
    const int first_head = DIMS > 1 ? 0 : threadIdx.x / HEAD_DIM, first_dim = threadIdx.x - first_head * HEAD_DIM;
    Turn turns[DIMS];
    T query[DIMS][HEADS][2], key[DIMS][2], value[DIMS];  // dims and their partners
    if (first_head < SPREAD) {
#pragma unroll
      for (int i = 0; i < DIMS; ++i) {
        const int dim = first_dim + i * THREADS;
        if (HEAD_DIM % THREADS && dim >= HEAD_DIM) break;
        turns[i] = Turn(p, row, dim);
        key[i][0] = k[dim], key[i][1] = k[turns[i].other];
        if (dim < V_DIM) value[i] = v[dim];
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
          const T* x = q + (first_head + h * SPREAD) * p.q_head;
          if (first_head + h * SPREAD < p.group) query[i][h][0] = x[dim], query[i][h][1] = x[turns[i].other];
        }
      }
    }
#pragma unroll 1
    for (int stage = early; stage < S::STAGES; ++stage) fetch(begin + warp + stage * WARPS, stage);
    if (first_head < SPREAD) {
#pragma unroll
      for (int i = 0; i < DIMS; ++i) {
        const int dim = first_dim + i * THREADS;
        if (HEAD_DIM % THREADS && dim >= HEAD_DIM) break;
        if (first_head == 0) {
          new_keys[dim] = from_float<T>(turns[i](key[i], 0));
          if (dim < V_DIM) new_values[dim] = value[i];
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
          const int member = first_head + h * SPREAD;
          if (member >= p.group) continue;
          const float scale = WIDE ? 1 : p.query_scale;  // what is rounded is not scaled before
          write(turns[i](query[i][h], 0) * scale, member, dim, queries);
          if (has_sinks) write(turns[i](query[i][h], 1) * scale, member, dim, queries + S::QUERIES * 8);
        }
      }
    }
  }
  // A member's query, counted over rows, tokens and heads.
  auto query_of = [&](int member) -> int64_t {
    if (!FEW) return pair * p.group + member;
    const int64_t token = int64_t(row) * tokens + first_token + member / p.group;
    return (token * p.num_kv_heads + head) * p.group + member % p.group;
  };
  const int nth = last_token - (tokens - int(count));  // of the new tokens; below 0: padding
  const int64_t t = length + nth;
  T* out = static_cast<T*>(p.out);
  if (nth < 0) {  // for all that share the key head
    if (rank == 0)
      for (int i = threadIdx.x; i < members * V_DIM; i += THREADS)
        out[query_of(i / V_DIM) * V_DIM + i % V_DIM] = from_float<T>(0);
    wait_for_copies<0>();
    if (clustered) cluster_wait();
    return;
  }
  __syncthreads();

  // Attend. Ages count from the last token of the block, or from the member's own, which is 0, back around the ring.
  const Seen last(p, t);
  const int new_slot = last.new_slot, spread = FEW ? min(own - 1, nth) : 0;  // ages of the block's own tokens, at most
  Seen seen[FEW ? ROWS : 1] = {last}, any = last;
  if constexpr (FEW) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) seen[r] = Seen(p, t - max(own - 1 - (g + 8 * r) / p.group, 0));
    if (any.reach > 0) any.reach = int(min(int64_t(p.window_size) + spread, t - p.sink_size + 1));
  }
  if (t < slots) end = min(end, int(t) / KEYS + 1);        // further tiles are empty
  const bool wraps = FEW && new_slot - nth < p.sink_size;  // new tokens lie at both ends

  const uint4* query_pieces = reinterpret_cast<uint4*>(queries) + lane * 2;
  auto query_piece = [&](int angle, int step, int half) {  // zero for heads that are not there, or past the last dim
    const bool inside = g + (WIDE ? 8 * half : 0) < members && (HEAD_DIM % 32 == 0 || step * 32 + c * 8 < HEAD_DIM);
    return inside ? query_pieces[angle * S::QUERIES + step * 64 + half] : make_uint4(0, 0, 0, 0);
  };
  constexpr bool KEEP = HEAD_DIM <= 128;  // the text query's in registers
  uint4 kept[KEEP ? S::K_STEPS : 1][2];
  if constexpr (KEEP) {
#pragma unroll
    for (int i = 0; i < 2 * S::K_STEPS; ++i) kept[i / 2][i % 2] = query_piece(0, i / 2, i % 2);
  }
  auto text_query = [&](int step, int half) {
    if constexpr (KEEP)
      return kept[step][half];
    else
      return query_piece(0, step, half);
  };
  auto sink_query = [&](int step, int half) { return query_piece(1, step, half); };

  float top[ROWS], total[ROWS], slope[ROWS], acc[S::V_STEPS * 8][4];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    top[r] = LOWEST, total[r] = 0;
    const int member = g + 8 * r;
    const bool has_slope = p.alibi_slopes && member < members;
    slope[r] = has_slope ? p.alibi_slopes[head * p.group + (FEW ? member % p.group : member)] * LOG2E : 0;
  }
#pragma unroll
  for (int i = 0; i < S::V_STEPS * 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;

  // Where the lane's pieces are: of key number g, steps 0 and 1; of values number 2 c and 2 c + 1.
  const int key_at[2] = {Rows<HEAD_DIM>::place(row_of(g), c), Rows<HEAD_DIM>::place(row_of(g), 4 + c)};
  const int value_at[2] = {Rows<V_DIM>::place(row_of(2 * c), g), Rows<V_DIM>::place(row_of(2 * c + 1), g)};
  const bool is_plain = !(p.softcap > 0) && !p.alibi_slopes;

  int stage = 0;
#pragma unroll 1
  for (int tile = begin + warp; tile < end; tile += WARPS) {
    wait_for_copies<S::STAGES - 1>();
    uint4 *key_rows = staged + stage * S::TILE, *value_rows = key_rows + Rows<HEAD_DIM>::SIZE;
    const int first = tile * KEYS;

    // Append: new tokens take the place of what their slots held, the block's own in the cache as well. What others
    // append there at this moment is hidden, or laid over like this.
    const int before = FEW ? nth : 0;
    if ((new_slot >= first && new_slot - before < first + KEYS) || wraps) {
      __syncwarp();
      for (int back = 0; back <= before; ++back) {
        int slot = new_slot - back;
        if (FEW && slot < p.sink_size && t - back >= p.sink_size) slot += p.ring_size;
        if (FEW && unsigned(slot - first) >= KEYS) continue;
        const uint4* new_key = reinterpret_cast<uint4*>(new_keys + (last_token - back) * HEAD_DIM);
        const uint4* new_value = reinterpret_cast<uint4*>(new_values + (last_token - back) * V_DIM);
        for (int i = lane; i < HEAD_DIM / 8; i += 32) {
          key_rows[Rows<HEAD_DIM>::place(slot - first, i)] = new_key[i];
          if (back < own) *reinterpret_cast<uint4*>(keys + slot * p.k_cache_slot + i * 8) = new_key[i];
        }
        for (int i = lane; i < V_DIM / 8; i += 32) {
          value_rows[Rows<V_DIM>::place(slot - first, i)] = new_value[i];
          if (back < own) *reinterpret_cast<uint4*>(values + slot * p.v_cache_slot + i * 8) = new_value[i];
        }
      }
    }
    __syncwarp();

    // Scores: product j is of keys number 8 j ... + 7, of which a lane gets 2 c and 2 c + 1.
    auto products = [&](float (&score)[2][4], auto query) {
      float more[2][4] = {};  // sums of their own, as products wait for the sum they add to
#pragma unroll
      for (int s = 0; s < S::K_STEPS; ++s) {
        const uint4 a = query(s, 0), b = query(s, 1);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const bool inside = HEAD_DIM % 32 == 0 || s * 32 + c * 8 < HEAD_DIM;
          const int place = key_at[s % 2] + s / 2 * Rows<HEAD_DIM>::COLUMN + j * 64;
          const uint4 key = inside ? key_rows[place] : make_uint4(0, 0, 0, 0);
          multiply<T>(score[j], a.x, b.x, a.y, b.y, key.x, key.y);
          multiply<T>(more[j], a.z, b.z, a.w, b.w, key.z, key.w);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) score[i / 4][i % 4] += more[i / 4][i % 4];
    };
    float score[2][4] = {};
    products(score, text_query);
    if (first < p.sink_size) {
      float of_sinks[2][4] = {};
      products(of_sinks, sink_query);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (first + row_of(j * 8 + c * 2 + i % 2) < p.sink_size) score[j][i] = of_sinks[j][i];
    }

    float x[ROWS][2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
          x[r][j][e] = WIDE ? score[j][2 * r + e] * p.query_scale : score[j][e] + score[j][2 + e];
    // Whether all of the tile is visible to all members: to the last token the oldest slot of its ring is, no age within
    // it begins anew, and the youngest slot is no younger than the first token. With a ring, sinks all are.
    const int from = max(first, p.sink_size), oldest = last.age_of(from, p.ring_size);
    const bool anew = new_slot >= from && new_slot < first + KEYS - 1 && last.reach < p.ring_size;
    const bool all = first + KEYS <= slots && !anew && oldest < last.reach &&
                     (!FEW || oldest - (first + KEYS - 1 - from) >= spread);
    bool hidden[2][2] = {};
    if (!all || !is_plain) mask(x, hidden, slope, p, seen, any, first, c);
    uint32_t weights[4];
    soften<T>(x, weights, top, total, acc);
    // Values: what is not visible may hold NaN, which a weight of zero would not undo.
#pragma unroll
    for (int j = 0; j < S::V_STEPS; ++j) {
      uint4 rows[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const bool inside = V_DIM % 64 == 0 || j * 64 + g * 8 < V_DIM;
        const int place = value_at[r % 2] + j * Rows<V_DIM>::COLUMN + r / 2 * 64;
        rows[r] = inside ? value_rows[place] : make_uint4(0, 0, 0, 0);
      }
      if (!all) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
          if (hidden[r / 2][r % 2]) rows[r] = make_uint4(0, 0, 0, 0);
      }
      const uint32_t (*words)[4] = reinterpret_cast<uint32_t (*)[4]>(rows);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const unsigned selector = odd ? 0x7632 : 0x5410;
          const uint32_t b0 = __byte_perm(words[0][i], words[1][i], selector);
          const uint32_t b1 = __byte_perm(words[2][i], words[3][i], selector);
          multiply<T>(acc[j * 8 + i * 2 + odd], weights[0], weights[1], weights[2], weights[3], b0, b1);
        }
      }
    }
    __syncwarp();  // all have read
    fetch(tile + S::STAGES * WARPS, stage);
    stage = stage + 1 == S::STAGES ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  __syncwarp();  // for the lanes' copies are each other's place

  // What the warp found, (group, V_DIM), where its tiles were.
  store_found<V_DIM>(acc, top, total, group, g, c, reinterpret_cast<float*>(staged), softmax[warp]);
  __syncthreads();

  // Combine: columns, (group, V_DIM), four at a time.
  const int columns = group * V_DIM;
  auto of_block = [&](int i) {
    return combine<WARPS>(WARPS, reinterpret_cast<float*>(shared) + i, S::WARP * 4, softmax[0][i / V_DIM],
                          MAX_GROUP * 2);
  };
  auto finish_at = [&](int i, const Combined& x) {
    const int member = i / V_DIM, dim = i % V_DIM;
    if (!FEW) return finish<T, V_DIM>(p, query_of(member), head * p.group + member, dim, x);
    const int behind = own - 1 - member / p.group;  // its token lies before the last one
    if (member >= members) return;
    if (behind <= nth) return finish<T, V_DIM>(p, query_of(member), head * p.group + member % p.group, dim, x);
    *reinterpret_cast<uint2*>(out + query_of(member) * V_DIM + dim) = make_uint2(0, 0);  // padding
  };
  if (splits == 1) {
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4) finish_at(i, of_block(i));
  } else if constexpr (LARGE) {
    float* handed_softmax = handed + splits * columns;
    const unsigned there = in_first_block(handed + rank * columns);
    const unsigned there_softmax = in_first_block(handed_softmax + rank * group * 2);
    const unsigned barrier = in_first_block(&arrived);
    cluster_wait();  // the first block of the cluster has started
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4) {
      const Combined x = of_block(i);
      hand_over(there + i * 4, x.sum, barrier);
      if (i % V_DIM == 0) hand_over(there_softmax + i / V_DIM * 8, make_float2(x.top, x.total), barrier);
    }
    if (rank > 0) return;
    wait_for_bytes(&arrived);
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4)
      finish_at(i, combine<MAX_CLUSTER>(splits, handed + i, columns, handed_softmax + i / V_DIM * 2, group * 2));
  } else {
    const int64_t pairs = int64_t(gridDim.z) * p.num_kv_heads;
    float* found_values = p.partials + pair * splits * columns;
    float* found_softmax = p.partials + pairs * splits * columns + pair * splits * group * 2;
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4) {
      const Combined x = of_block(i);
      *reinterpret_cast<float4*>(found_values + rank * columns + i) = x.sum;
      if (i % V_DIM == 0)
        *reinterpret_cast<float2*>(found_softmax + (rank * group + i / V_DIM) * 2) = make_float2(x.top, x.total);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      is_last = count_in(p.arrivals + pair) == splits - 1;
      if (is_last) p.arrivals[pair] = 0;  // for the next launch
    }
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x * 4; i < columns; i += THREADS * 4)
      finish_at(i, combine<8>(splits, found_values + i, columns, found_softmax + i / V_DIM * 2, group * 2));
  }
}

}  // namespace
}  // namespace sinkattn::cuda
